"""The whole MLP of the selected tokens, beside that of all tokens."""

TIMED = ("mlp_",)


def test_mlp(timed):
    timed()
