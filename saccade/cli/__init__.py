"""Floor 7: the command line.  One module a command, a function that typer reads."""
