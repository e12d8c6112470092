"""How fast the operators are, next to what the machine could do and what peers do."""
