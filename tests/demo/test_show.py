import matplotlib.image

from tokencache_kernels.commands.cli import main
from tokencache_kernels.demo import show
from tokencache_kernels.demo.methods import parse_method


def test_the_demo_prints_a_line_a_method_and_writes_the_picture(weights, tmp_path, capsys):
    out = tmp_path / "demo.png"

    status = main(
        [*("demo", "--digits", "2", "--steps", "4"), "--weights", str(weights), "--out", str(out)]
    )

    printed = capsys.readouterr().out
    assert status == 0
    # two are trained for 50 steps
    assert "Without tokencache: " in printed
    assert "Without l2c: " in printed
    assert "\nDrawing 2 digits in 6 ways" in printed
    assert str(out) in printed
    titles = ("dense, 2 steps", "FORA, every 3", "random tokens, every 3", "TaylorSeer 1, every 3")
    for title in ("dense", "ToCa, every 3", *titles):
        assert f"\n{title} " in printed
    height, width, _ = matplotlib.image.imread(out).shape
    assert min(height, width) > 500


def make_result(name, seconds, decibels):
    method = parse_method(name, 50)
    return show.Result(method, None, seconds, 2 / seconds, method.flops_ratio, decibels, 1.0)


def test_a_method_slower_than_dense_is_named(capsys):
    show.print_verdict([make_result("dense", 2.0, 99.0), make_result("fewer-25", 4.0, 20.0)])

    printed = capsys.readouterr().out
    assert printed.startswith(
        "dense, 25 steps was slower than dense here: 2.00 times less arithmetic took 2.00 times"
    )
    assert "came nearer" not in printed


def test_fewer_steps_that_beat_a_policy_are_named(capsys):
    results = [
        make_result("dense", 2.0, 99.0),
        make_result("toca-3", 1.5, 20.0),
        make_result("toca-3-40", 1.5, 40.0),
        make_result("fora-3", 0.5, 10.0),
        make_result("fewer-25", 1.0, 30.0),
    ]

    show.print_verdict(results)

    printed = capsys.readouterr().out
    assert "dense, 25 steps came nearer to dense in less time than ToCa, every 3:" in printed
    assert "slower" not in printed
