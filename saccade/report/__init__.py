"""Records of what was measured, and their renderings."""
