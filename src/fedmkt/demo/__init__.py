"""A whole federation on one machine, from nothing but the text and the processors that it already has."""
