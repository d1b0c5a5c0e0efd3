"""The row pass: gated branches added to all tokens, the selected ones modulated."""

TIMED = ("row_pass",)


def test_modulate(timed):
    timed()
