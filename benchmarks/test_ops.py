"""Every op of ``cases`` by every contender, as the stages ``kernels`` and ``attention`` do it."""


def test_op(timed):
    timed()
