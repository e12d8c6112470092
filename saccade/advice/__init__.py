"""Advice: which options make a model run a context in the memory that is there, and how fast."""
