"""Members in one pass."""
