"""Benchmarks of ops, layers and models, and the run book for a machine with a GPU."""
