"""Folders and files as such: names, one run at a time, written whole or not at all, sealed, removed again."""
