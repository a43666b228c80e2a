"""The repair: factored gradients, rollback along the fine-tune's own update, the guard, and the methods."""
