"""The agent of one site: trains on private text, shares knowledge of the public set, learns from the LLM's."""
