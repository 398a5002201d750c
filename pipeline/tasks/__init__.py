"""Kinds of target: losses and scores."""
