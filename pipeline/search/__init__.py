"""Proposing settings: space, proposals."""
