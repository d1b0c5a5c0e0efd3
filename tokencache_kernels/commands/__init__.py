"""The command ``tokencache`` and its subcommands."""
