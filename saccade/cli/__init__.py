"""The command line: one module a command, each a function that typer reads."""
