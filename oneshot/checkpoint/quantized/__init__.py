"""Weights in fewer bits: NF4 while reading, and what files hold with scales."""
