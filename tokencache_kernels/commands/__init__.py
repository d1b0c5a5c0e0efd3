"""Subcommands of ``tokencache`` that belong to no other layer."""
