"""Checkpoints, adapters and training states, and what is known of each beside it."""
