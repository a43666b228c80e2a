"""Conversations in, token batches out: sources, chat template and loss mask."""
