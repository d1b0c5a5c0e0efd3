"""Selection: scores combined, the top tokens found, staleness updated."""

TIMED = ("select_tokens_",)


def test_select(timed):
    timed()
