import matplotlib.image

from tokencache_kernels.cli import main
from tokencache_kernels.demo import show


def test_the_demo_prints_a_line_a_method_and_writes_the_picture(weights, tmp_path, capsys):
    out = tmp_path / "demo.png"

    status = main(
        [*("demo", "--digits", "2", "--steps", "4"), "--weights", str(weights), "--out", str(out)]
    )

    printed = capsys.readouterr().out
    assert status == 0
    assert printed.startswith("Drawing 2 digits in 6 ways")
    assert str(out) in printed
    titles = ("dense", "dense, 2 steps", "FORA, every 3", "random tokens, every 3", "ToCa, every 5")
    for title in titles:
        assert f"\n{title} " in printed
    height, width, _ = matplotlib.image.imread(out).shape
    assert min(height, width) > 500


def test_a_method_slower_than_dense_is_named(capsys):
    dense = show.parse_method("dense", 50)
    slow = show.parse_method("fewer-25", 50)
    results = [
        show.Result(method, None, seconds, 1 / seconds, method.flops_ratio, 20.0, 1.0)
        for method, seconds in ((dense, 1.0), (slow, 2.0))
    ]

    show.print_verdict(results)

    assert capsys.readouterr().out.startswith(
        "dense, 25 steps was slower than dense here: 2.00 times less arithmetic took 2.00 times"
    )
