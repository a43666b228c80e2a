"""Repair the safety of a fine-tuned language model with one example, at any size (arXiv 2601.01887)."""

__version__ = "0.1.0"
