"""Linear layers on packed rows: with their activation, with their scatter."""

TIMED = ("linear", "linear_scatter_")


def test_linear(timed):
    timed()
