"""The folder that a training pass leaves."""
