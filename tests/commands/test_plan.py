"""``tokencache plan`` against the published schedules, counts, totals and sizes."""

import re

import pytest

from tokencache_kernels.commands.cli import main


@pytest.fixture
def plan(capsys):
    """Run the command; the computed tokens by step and module, and the columns of the totals."""

    def run(*arguments):
        assert main(["plan", *map(str, arguments)]) == 0
        listed, totals = capsys.readouterr().out.split("\n\n")[1:]
        steps = {}
        for entry in re.split(r"^steps ", listed, flags=re.MULTILINE)[1:]:
            indices, what = entry.split(":", 1)
            modules = dict(line.split(": ") for line in what.strip().splitlines() if ": " in line)
            counts = {name.strip(): expand(text) for name, text in modules.items()}
            steps |= dict.fromkeys(ranges(indices), counts or what.strip())
        header, *rows = totals.splitlines()
        columns = {title: {} for title in header.split()}
        for row in rows:
            name, values = row[:20].strip(), row[20:].split()
            for column, value in zip(columns.values(), values, strict=True):
                column[name] = value if value == "-" else float(value)
        return steps, columns

    return run


def ranges(text):
    bounds = [part.split("-") for part in text.split(", ")]
    return [index for bound in bounds for index in range(int(bound[0]), int(bound[-1]) + 1)]


def expand(text):
    runs = [run.split("x") for run in text.split()]
    return [int(run[0]) for run in runs for _ in range(int(run[1]) if len(run) > 1 else 1)]


def full(steps):
    return [index for index, counts in sorted(steps.items()) if counts == "all"]


def test_the_published_schedule_of_dit(plan):
    steps, totals = plan("--model", "dit-xl", "--policy", "toca", "--published")

    counting_down = [49, 44, 40, 36, 30, 27, 24, 21, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0]
    assert full(steps) == [49 - s for s in counting_down]
    for s in (45, 32):
        assert steps[49 - s]["main attn"] == [256] + [0] * 27
    # the time factor is negative before: no token
    assert steps[49 - 38] == "none"
    for s, first, last in ((33, 12, 19), (28, 27, 40), (22, 44, 66), (15, 64, 96), (7, 87, 131)):
        assert (steps[49 - s]["main mlp"][0], steps[49 - s]["main mlp"][-1]) == (first, last)
    assert totals["published"]["TFLOP"] == pytest.approx(10.19, rel=0.003)
    assert totals["published"]["dense TFLOP"] == pytest.approx(23.68, rel=0.003)
    assert totals["published"]["times fewer FLOPs"] == 2.32


def test_our_schedule_of_dit_is_decided_once_a_step(plan):
    published, _ = plan("--model", "dit-xl", "--published")
    ours, totals = plan("--model", "dit-xl")

    assert set(full(ours)) - set(full(published)) == {49 - 45, 49 - 32}
    assert totals["ours"]["full steps"] == 20


def test_the_published_schedule_of_ddpm(plan):
    steps, totals = plan("--model", "dit-xl", "--preset", "dit-xl-ddpm250", "--published")

    assert len(full(steps)) == 72
    first = [249, 240, 234, 228, 222, 216, 210, 205, 200, 195]
    assert full(steps)[:10] == [249 - s for s in first]
    for s, front, back in ((248, 48, 5), (188, 64, 7), (125, 80, 8), (41, 102, 11)):
        assert steps[249 - s]["main mlp"][0] == front
        assert steps[249 - s]["main mlp"][-1] == back
    assert totals["published"]["TFLOP"] == pytest.approx(43.24, rel=0.003)


def test_the_published_schedule_of_pixart(plan):
    steps, totals = plan("--model", "pixart-alpha", "--policy", "toca", "--published")

    assert full(steps) == [0, 6, 9, 12, 15, 18]
    assert steps[4]["main cross"][0] == 256
    for step, cross, mlp in (
        (1, (133, 33), (256, 88)),
        (5, (106, 26), (256, 71)),
        (10, (73, 18), (196, 49)),
        (14, (47, 11), (125, 31)),
        (19, (14, 3), (37, 9)),
    ):
        assert (steps[step]["main cross"][0], steps[step]["main cross"][-1]) == cross
        assert (steps[step]["main mlp"][0], steps[step]["main mlp"][-1]) == mlp
    assert totals["published"]["TFLOP"] == pytest.approx(5.76, rel=0.003)
    assert totals["published"]["times fewer FLOPs"] == 1.94
    # keys and values of 2 x 20 text tokens in 28 layers, in two bytes
    assert totals["ours"]["text, MiB"] == pytest.approx(2 * 28 * 40 * 1152 * 2 / 2**20, abs=0.05)
    assert list(totals["ours"])[-1] == "cache, GB"


def test_the_published_schedule_of_opensora(plan):
    steps, totals = plan("--model", "opensora", "--policy", "toca")

    assert full(steps) == [0, 1, 2, 6, 12, 18, 24]
    assert [s for s in range(30) if "spatial attn" in steps[s]] == [3, 9, 15, 21, 27]
    assert steps[4] == {"spatial mlp": [3565] * 28, "temporal mlp": [3565] * 28}
    assert totals["ours"]["TFLOP"] == pytest.approx(1392.8, rel=0.003)


@pytest.mark.parametrize(
    ("interval", "tera", "wanted"),
    [
        (4, 1262.1, [0, 1, 2, *range(6, 47, 4)]),
        (5, 1125.7, [0, 1, 2, *range(7, 48, 5)]),
        (6, 989.3, [0, 1, 2, *range(8, 45, 6)]),
    ],
)
def test_the_published_schedule_of_flux(plan, interval, tera, wanted):
    steps, totals = plan(
        *("--model", "flux-1-dev", "--height", 1024, "--width", 1024, "--policy", "toca"),
        *("--refresh-interval", interval),
    )

    assert full(steps) == wanted
    partial = steps[3]
    assert [partial["double mlp"][layer] for layer in (0, 9, 18)] == [245, 191, 136]
    assert [partial["double text_mlp"][layer] for layer in (0, 18)] == [30, 17]
    single = partial["single mlp"]
    assert (*single[:4], single[18], *single[-2:]) == (1105, 1078, 1051, 1024, 614, 122, 95)
    assert totals["published"]["TFLOP"] == pytest.approx(tera, rel=0.003)
    # a projection that is made once does not change within a cycle
    assert totals["ours"]["TFLOP"] == pytest.approx(tera - 1.652 * (50 - len(wanted)), rel=0.003)


def test_flux_in_bfloat16_fits_into_3_3_gigabytes(plan):
    _, totals = plan(
        *("--model", "flux-1-dev", "--height", 1024, "--width", 1024, "--dtype", "bfloat16")
    )

    assert totals["ours"]["cache, GB"] <= 3.3
    assert totals["published"]["features, MiB"] == 1_026 + 6_156
    assert totals["published"]["maps, MiB"] == 972


@pytest.mark.parametrize(
    ("arguments", "features", "scores", "maps"),
    [
        pytest.param("dit-xl", 126, 14, 8, id="dit-256px"),
        pytest.param("dit-xl --batch 300", 18_900, 2_100, 1_200, id="dit-150-images"),
        pytest.param("dit-xl --height 512 --width 512", 504, 224, 128, id="dit-512px"),
        pytest.param(
            "pixart-alpha --batch 200 --text-tokens 30", 9_450, 700 + 16_400, 9_375,
            id="pixart-100-images",
        ),
        pytest.param("opensora --text-tokens 30", 17_608, 306, 87, id="opensora"),
    ],
)  # fmt: skip
def test_the_published_cache_sizes(plan, arguments, features, scores, maps):
    _, totals = plan("--model", *arguments.split())

    published = totals["published"]
    assert published["features, MiB"] == pytest.approx(features, abs=0.5)
    assert published["scores, MiB"] == pytest.approx(scores, rel=0.002)
    assert published["maps, MiB"] == pytest.approx(maps, rel=0.005)
    assert totals["ours"]["features, MiB"] == published["features, MiB"]
    assert totals["ours"]["scores, MiB"] < 0.07 * published["scores, MiB"]
    assert totals["ours"]["maps, MiB"] == "-"


def test_fora_recomputes_no_token_and_keeps_no_score(plan):
    steps, totals = plan("--model", "flux-1-dev", "--policy", "fora")

    assert full(steps) == list(range(0, 50, 3))
    assert set(map(str, steps.values())) == {"all", "none"}
    assert totals["ours"]["times fewer FLOPs"] == pytest.approx(50 / 17, abs=0.005)
    # the total of the published README
    assert totals["published"]["TFLOP"] == pytest.approx(1320.07, rel=0.003)
    assert totals["ours"]["scores, MiB"] == totals["ours"]["staleness, MiB"] == "-"
    # a third less than under ToCa: nothing reads the attention of single blocks
    assert totals["ours"]["features, MiB"] == pytest.approx(1 / 1.5 * 3078, abs=0.05)


def places(steps):
    kinds = {"all": "F", "no block runs": "a"}
    return "".join(kinds.get(str(counts), "p") for _, counts in sorted(steps.items()))


def test_the_published_steps_of_duca(plan):
    dit, totals = plan("--model", "dit-xl", "--policy", "duca")
    pixart, _ = plan("--model", "pixart-alpha", "--policy", "duca")
    opensora, of_opensora = plan("--model", "opensora", "--policy", "duca")

    # counting down in cycles of tau: even places are aggressive, so tau = 3 gives full, a, p
    assert places(dit) == "FpapFFpapFpapFpapFpFapFapFapFapFpFpFpFpFpFpFpFpFpF"
    assert totals["ours"]["output, MiB"] == pytest.approx(2 * 256 * 1152 * 4 / 2**20, abs=0.05)
    # counting up: partial, then aggressive; 4 is full and no multiple of the tau behind it
    assert places(pixart) == "FpapFaFpaFpaFpaFpaFp"
    # cross-attention is full every other time
    assert places(opensora) == "FFF" + 4 * "ppaFpa" + "ppa"
    assert of_opensora["ours"]["times fewer FLOPs"] == pytest.approx(2.50, rel=0.004)


@pytest.mark.parametrize(("interval", "ratio"), [(5, 3.80), (7, 4.89), (10, 6.13)])
def test_the_published_ratios_of_duca_on_flux(plan, interval, ratio):
    steps, totals = plan(
        *("--model", "flux-1-dev", "--policy", "duca", "--refresh-interval", interval)
    )

    assert places(steps).startswith("FFFapapapapap"[: 3 + interval - 1] + "F")
    # against the published dense total
    assert 3719.5 / totals["ours"]["TFLOP"] == pytest.approx(ratio, abs=0.005)


def test_taylor_seer_keeps_a_buffer_for_each_order(plan):
    steps, totals = plan("--model", "dit-xl", "--policy", "taylor-seer", "--forecast-order", 2)
    _, first = plan("--model", "dit-xl", "--policy", "taylor-seer", "--forecast-order", 1)

    assert full(steps) == [0, 1, *range(2, 50, 5)]
    assert totals["ours"]["differences, MiB"] == 2 * totals["ours"]["features, MiB"] == 2 * 126
    assert first["ours"]["differences, MiB"] == 126


def test_random_tokens_are_as_many_as_the_scored_ones(plan):
    assert plan("--model", "demo", "--policy", "random") == plan("--model", "demo")


def test_a_router_is_planned_from_its_file(plan):
    from tokencache_kernels.demo.train_l2c import ROUTER

    steps, totals = plan("--model", "demo", "--policy", "l2c", "--trained", ROUTER)

    assert set(range(0, 50, 2)) <= set(full(steps))
    assert 1.2 < totals["ours"]["times fewer FLOPs"] < 2
    # by sub-layer, all tokens or none
    skipping = [counts for counts in steps.values() if isinstance(counts, dict)]
    assert {n for counts in skipping for layers in counts.values() for n in layers} == {0, 256}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("flux-1-dev --height 1000", "height must be a positive multiple of 16, got 1000"),
        ("demo --width 0", "width must be a positive multiple of 2, got 0"),
        ("dit-xl --text-tokens 77", "text_tokens must be left out where no text is read, got 77"),
        ("pixart-alpha --text-tokens 0", "text_tokens must be at least 1, got 0"),
        ("opensora --batch -1", "batch must be at least 1, got -1"),
        ("dit-xl --steps 0", "num_inference_steps must be at least 1, got 0"),
        ("dit-xl --fresh-ratio 1.5", r"base must be in \[0, 1\], got 1.5"),
        ("dit-xl --refresh-interval 0", "refresh_interval must be at least 1, got 0"),
        ("dit-xl --policy fora --fresh-ratio 0.1", "--fresh-ratio must be left out for fora, got"),
        ("dit-xl --preset sdxl", "name must be one of dit-xl-ddim50, .*, got 'sdxl'"),
        (
            "demo --policy taylor-seer --forecast-order=-1",
            "Taylor: order must be at least 0, got -1",
        ),
        ("dit-xl --forecast-order 1", "--forecast-order must be left out for toca, got 1"),
        ("demo --policy l2c", "--trained must be given for l2c, got nothing"),
        ("demo --policy l2c --trained nowhere", "path must be a file, got nowhere"),
        ("demo --policy l2c --steps 20", "--steps must be left out for l2c, got 20"),
        ("demo --published", "--published must be left out where there is no published code"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(arguments, sentence, capsys):
    assert main(["plan", "--model", *arguments.split()]) == 1

    printed = capsys.readouterr()
    assert printed.out == ""
    assert re.fullmatch(rf"tokencache plan: [^\n]*{sentence}[^\n]*\n", printed.err)
