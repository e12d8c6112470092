"""Attention, full or masked, over any view of keys and values."""
