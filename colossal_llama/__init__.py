"""Adapts a Llama-family model to a new language or domain, from vocabulary to checkpoint."""

__version__ = "0.1.0"
