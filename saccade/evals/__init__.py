"""Floor 6: questions asked of the whole system: quality, memory and speed side by side."""
