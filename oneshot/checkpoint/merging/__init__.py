"""Adapters merged into checkpoints, taken out again, and made of two."""
