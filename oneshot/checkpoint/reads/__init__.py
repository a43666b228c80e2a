"""Ranges of tensors straight from files, each byte once, and checked as they come in."""
