"""The bytes of one input, by number, and how they are decoded."""
