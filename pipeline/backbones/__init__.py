"""Input to taps: the frozen backbones, their blocks, and what is made of their weights."""
