"""Floor 6: quality, memory and speed of the whole system, measured side by side."""
