"""The offline tour."""
