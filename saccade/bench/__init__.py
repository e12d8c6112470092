"""Floor 6: how fast the operators are, next to what the machine could do and what peers do."""
