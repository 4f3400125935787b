"""FedMKT: one large and many small language models teach each other without sharing text or weights."""

__version__ = "0.1.0"
