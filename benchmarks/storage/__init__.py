"""Loading from storage whose files are not in the page cache, and a slow file system to do it from."""
