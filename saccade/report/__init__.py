"""Floor 5: records of what was measured, and their renderings."""
