"""Scripts for those who work on saccade."""
