"""Rows of selected tokens: gathered into packed rows, and scattered back."""

TIMED = ("gather_rows", "scatter_rows_")


def test_rows(timed):
    timed()
