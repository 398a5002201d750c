"""Taps and stored numbers: casting, writing, reading back as operands, and where they live."""
