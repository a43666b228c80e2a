"""The user's model and tokenizer, whole or each rank its own part."""
