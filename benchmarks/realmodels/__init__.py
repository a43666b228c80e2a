"""``benchmarks/real.py``: attacks and repairs of real instruct models, scored on public prompt sets."""
