"""pairdr: dense passage retrievers trained, evaluated, indexed and served the PAIR way."""

__version__ = "0.1.0"
