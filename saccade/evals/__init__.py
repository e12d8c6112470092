"""Quality, memory and speed of a model under different options, measured side by side."""
