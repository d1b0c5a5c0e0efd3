"""What is timed, how, and the run book for a machine with a GPU."""
