"""Hugging Face checkpoints and PEFT adapters on disk: find, check, read, load, write."""
