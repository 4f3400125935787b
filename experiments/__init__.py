"""Which rules transfer knowledge, and when: arms played with the product's own phases, over many seeds."""
