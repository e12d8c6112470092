"""Floor 7: the command line.  One module a subcommand: `add_arguments(parser)`, `run(args)`."""
