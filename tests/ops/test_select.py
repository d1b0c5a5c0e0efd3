import math

import pytest
import torch

from tokencache_kernels.ops import invert_indices, select_cycle_, select_tokens, select_tokens_
from tokencache_kernels.testing import distinct_scores, random_indices

OPS = ("select_tokens_", "invert_indices")


def choose_by_hand(scores, staleness, count, weight, normalize, grid, tile, bonus):
    """The meaning for one sample, written as loops over Python floats: the fresh tokens."""
    values = scores.double().tolist()
    finite = [value for value in values if not math.isnan(value)]
    norm = max(math.sqrt(sum(value * value for value in finite)), 1e-12) if normalize else 1.0
    mixed = []
    for value, stale in zip(values, staleness.tolist(), strict=True):
        mixed.append(-math.inf if math.isnan(value) else value / norm + weight * stale)
    if grid is not None:
        height, width = grid
        for top in range(0, height, tile):
            for left in range(0, width, tile):
                square = [
                    y * width + x
                    for y in range(top, min(top + tile, height))
                    for x in range(left, min(left + tile, width))
                ]
                mixed[max(square, key=lambda token: (mixed[token], -token))] *= 1 + bonus
    ranked = sorted(range(len(mixed)), key=lambda token: (-mixed[token], token))
    return sorted(ranked[:count])


def assert_selected(indices, positions, wanted):
    """One sample's result: the tokens wanted, ascending, then -1; and their inverse."""
    empty = [-1] * (indices.numel() - len(wanted))
    assert indices.tolist() == wanted + empty
    slots = {token: slot for slot, token in enumerate(wanted)}
    assert positions.tolist() == [slots.get(token, -1) for token in range(positions.numel())]


CASES = [
    pytest.param(1, 2, 37, 11, 0.02, True, None, 2, 0.0, id="odd-sizes"),
    pytest.param(2, 1, 64, 64, 0.0, True, (8, 8), 2, 0.4, id="all-tokens-on-a-grid"),
    pytest.param(1, 2, 35, 9, 0.01, True, (5, 7), 2, 0.6, id="squares-cut-at-the-edges"),
    pytest.param(1, 1, 35, 9, 3.0, False, (7, 5), 3, 0.5, id="larger-squares"),
    pytest.param(1, 1, 12, 5, 1.0, False, (1, 12), 4, 0.5, id="one-line"),
    pytest.param(1, 1, 12, 5, 1.0, False, (4, 3), 9, 0.5, id="one-square"),
    pytest.param(1, 1, 12, 5, 1.0, False, (4, 3), 1, 0.5, id="squares-of-one"),
    pytest.param(2, 2, 1, 1, 0.0, True, None, 2, 0.0, id="one-token"),
    pytest.param(1, 2, 9, 0, 0.1, True, None, 2, 0.0, id="no-slot"),
    pytest.param(2, 0, 9, 3, 0.1, True, None, 2, 0.0, id="no-sample"),
]


@pytest.mark.parametrize(
    ("L", "B", "N", "S", "weight", "normalize", "grid", "tile", "bonus"), CASES
)
def test_the_top_is_chosen_index_for_index(
    backend, device, L, B, N, S, weight, normalize, grid, tile, bonus
):
    scores = distinct_scores(L, B, N)
    # 7 * i mod 5 is a pattern that neither follows the scores nor the grid
    staleness = (7 * torch.arange(L * B * N, dtype=torch.int32) % 5).reshape(L, B, N)

    indices, positions, updated = select_tokens(
        scores.to(device), staleness.to(device), S,
        staleness_weight=weight, normalize=normalize, grid=grid, tile=tile, bonus=bonus,
        backend=backend,
    )  # fmt: skip

    assert indices.shape == (L, B, S)
    assert positions.shape == updated.shape == (L, B, N)
    assert indices.dtype == positions.dtype == updated.dtype == torch.int32
    for layer in range(L):
        for b in range(B):
            wanted = choose_by_hand(
                scores[layer, b], staleness[layer, b], S, weight, normalize, grid, tile, bonus
            )
            assert_selected(indices[layer, b], positions[layer, b], wanted)
    stale = torch.where(positions.cpu() >= 0, 0, staleness + 1)
    torch.testing.assert_close(updated.cpu(), stale, rtol=0, atol=0)


def test_more_tokens_than_a_program_holds_at_once(backend, device):
    scores = distinct_scores(1, 8212)
    # a threshold amid ties that lie in different blocks
    scores[0, torch.tensor([3, 5000, 5001, 8190, 8211])] = 8000.5
    count = int((scores > 8000.5).sum()) + 3

    indices, positions, _ = select_tokens(
        scores.to(device), torch.zeros(1, 8212, dtype=torch.int32, device=device), count + 40,
        backend=backend,
    )  # fmt: skip
    fewer, fewer_positions, _ = select_tokens(
        scores.to(device), torch.zeros(1, 8212, dtype=torch.int32, device=device), count,
        grid=(4, 2053), tile=3, backend=backend,
    )  # fmt: skip

    zeros = torch.zeros(8212, dtype=torch.int32)
    wanted = choose_by_hand(scores[0], zeros, count + 40, 0.0, True, None, 2, 0.0)
    assert_selected(indices[0], positions[0], wanted)
    wanted = choose_by_hand(scores[0], zeros, count, 0.0, True, None, 2, 0.0)
    assert {3, 5000, 5001} < set(wanted)
    assert not {8190, 8211} & set(wanted)
    assert_selected(fewer[0], fewer_positions[0], wanted)


# a gain of -0 leaves a score of -0 unchanged
@pytest.mark.parametrize("weight", [0.0, -0.25])
def test_ties_go_to_the_lowest_index(backend, device, weight):
    scores = torch.tensor([[1.0, 2.0, 2.0, 0.0, -0.0, 2.0, 0.0, -1.0, 2.0]], device=device)
    staleness = torch.zeros(1, 9, dtype=torch.int32, device=device)

    def top(count):
        indices, _, _ = select_tokens(
            scores, staleness, count, staleness_weight=weight, backend=backend
        )
        return indices[0].tolist()

    assert top(2) == [1, 2]
    assert top(3) == [1, 2, 5]
    # 0 and -0 are equal
    assert top(7) == [0, 1, 2, 3, 4, 5, 8]
    assert top(8) == [0, 1, 2, 3, 4, 5, 6, 8]


def test_the_first_of_equals_wins_its_square(backend, device):
    scores = torch.tensor([[3.0, 3.0, 4.0, 1.0, 3.0, 2.0, 1.0, 4.0]], device=device)
    staleness = torch.zeros(1, 8, dtype=torch.int32, device=device)

    indices, _, _ = select_tokens(
        scores, staleness, 2, grid=(2, 4), bonus=0.5, normalize=False, backend=backend
    )

    # winners: token 0 with 4.5 (not 1, not 4), token 2 with 6 (not 7)
    assert indices.tolist() == [[0, 2]]


@pytest.mark.parametrize("normalize", [False, True])
def test_nan_ranks_below_everything(backend, device, normalize):
    nan, inf = math.nan, math.inf
    scores = torch.tensor([[nan, -5.0, 2.0, nan, 1.0], [-inf, nan, inf, 1.0, 2.0]], device=device)
    staleness = torch.zeros(2, 5, dtype=torch.int32, device=device)
    if normalize:
        # an infinite norm leaves no order
        scores, staleness = scores[:1], staleness[:1]

    for count, wanted in ((2, [[2, 4], [2, 4]]), (3, [[1, 2, 4], [2, 3, 4]])):
        indices, _, _ = select_tokens(
            scores, staleness, count, normalize=normalize, backend=backend
        )
        assert indices.tolist() == wanted[: len(scores)]
    indices, _, _ = select_tokens(scores, staleness, 4, normalize=normalize, backend=backend)
    assert indices[0].tolist() == [0, 1, 2, 4]


def test_all_nan_takes_the_first_tokens(backend, device):
    scores = torch.full((1, 9), math.nan, device=device)
    staleness = torch.zeros(1, 9, dtype=torch.int32, device=device)

    indices, _, _ = select_tokens(
        scores, staleness, 4, grid=(3, 3), bonus=0.5, staleness_weight=1.0, backend=backend
    )

    assert indices.tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize("N", [33, 8212])
def test_normalised_scores_have_no_unit(backend, device, N):
    scores = distinct_scores(2, N, device=device)
    staleness = torch.randint(0, 9, (2, N), generator=torch.Generator().manual_seed(0))
    staleness = staleness.int().to(device)
    other_units = torch.tensor([[1024.0], [2**-10]], device=device)

    def select(scale, normalize):
        options = {"staleness_weight": 0.05, "normalize": normalize, "backend": backend}
        return select_tokens(scores * scale, staleness, 9, **options)[0]

    torch.testing.assert_close(select(other_units, True), select(1.0, True), rtol=0, atol=0)
    assert not torch.equal(select(1024.0, False), select(2**-10, False))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_low_precision_scores_are_compared_as_they_are(backend, device, dtype):
    # up to 256 every whole number is exact in both
    scores = distinct_scores(2, 1, 50)
    staleness = torch.zeros(2, 1, 50, dtype=torch.int32)

    indices, positions, _ = select_tokens(
        scores.to(device, dtype), staleness.to(device), 13, backend=backend
    )

    for layer in range(2):
        wanted = choose_by_hand(scores[layer, 0], staleness[layer, 0], 13, 0.0, True, None, 2, 0.0)
        assert_selected(indices[layer, 0], positions[layer, 0], wanted)


def test_a_slice_of_scores_is_read_in_place(backend, device):
    wide = distinct_scores(3, 4, 50, device=device)
    staleness = torch.zeros(2, 2, 37, dtype=torch.int32, device=device)

    from_slice = select_tokens(wide[1:, ::2, 5:42], staleness, 9, backend=backend)
    from_copy = select_tokens(wide[1:, ::2, 5:42].contiguous(), staleness, 9, backend=backend)

    for one, other in zip(from_slice, from_copy, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_staleness_visits_every_token_in_turn(backend, device):
    scores = torch.full((1, 20), 0.5, device=device)
    staleness = torch.zeros(1, 20, dtype=torch.int32, device=device)

    visited = []
    for _ in range(4):
        indices, _ = select_tokens_(scores, staleness, 5, staleness_weight=0.25, backend=backend)
        visited += indices[0].tolist()

    assert visited == list(range(20))
    assert staleness[0].tolist() == [3] * 5 + [2] * 5 + [1] * 5 + [0] * 5


def test_without_staleness_more_tokens_hold_the_fewer(backend, device):
    scores = distinct_scores(1, 37, device=device)
    scores[0, ::3] = scores[0, 1]
    staleness = torch.ones(1, 37, dtype=torch.int32, device=device)

    chosen: set[int] = set()
    for count in (0, 1, 5, 12, 20, 37):
        indices, _, _ = select_tokens(scores, staleness, count, backend=backend)
        more = set(indices[0].tolist())
        assert len(more) == count
        assert chosen <= more
        chosen = more


def test_each_layer_takes_its_own_count_clamped(backend, device):
    scores = distinct_scores(5, 2, 23, device=device)
    staleness = torch.ones(5, 2, 23, dtype=torch.int32, device=device)
    num_fresh = torch.tensor([4, 0, 99, -3, 7], dtype=torch.int32, device=device)

    indices, positions, updated = select_tokens(
        scores, staleness, 7, num_fresh=num_fresh, backend=backend
    )

    assert (indices >= 0).sum(-1).tolist() == [[4, 4], [0, 0], [7, 7], [0, 0], [7, 7]]
    assert (positions >= 0).sum(-1).tolist() == [[4, 4], [0, 0], [7, 7], [0, 0], [7, 7]]
    # also where nothing is selected, the tokens get older
    assert updated[[1, 3]].unique().tolist() == [2]
    alone, _, _ = select_tokens(scores[0], staleness[0], 4, backend=backend)
    torch.testing.assert_close(indices[0, :, :4], alone, rtol=0, atol=0)


def test_a_cycle_equals_its_steps_in_turn(backend, device):
    scores = distinct_scores(2, 2, 30, device=device)
    staleness = torch.randint(0, 4, (2, 2, 30), generator=torch.Generator().manual_seed(0))
    staleness = staleness.int().to(device)
    step_by_step = staleness.clone()
    num_fresh = torch.tensor([[6, 3], [0, 8], [8, 1]], dtype=torch.int32, device=device)
    options = {"staleness_weight": 0.1, "grid": (5, 6), "bonus": 0.4, "backend": backend}

    indices, positions = select_cycle_(scores, staleness, num_fresh, 8, **options)

    assert indices.shape == (3, 2, 2, 8)
    for step, counts in enumerate(num_fresh):
        wanted = select_tokens_(scores, step_by_step, 8, num_fresh=counts, **options)
        torch.testing.assert_close((indices[step], positions[step]), wanted, rtol=0, atol=0)
    torch.testing.assert_close(staleness, step_by_step, rtol=0, atol=0)


def test_a_batch_equals_its_elements_run_alone(backend, device):
    scores = distinct_scores(3, 26, device=device)
    staleness = torch.zeros(3, 26, dtype=torch.int32, device=device)

    indices, positions, _ = select_tokens(scores, staleness, 7, backend=backend)

    for b in range(3):
        alone = select_tokens(scores[b : b + 1], staleness[b : b + 1], 7, backend=backend)
        torch.testing.assert_close(alone[0][0], indices[b], rtol=0, atol=0)
        torch.testing.assert_close(alone[1][0], positions[b], rtol=0, atol=0)


@pytest.mark.parametrize(("B", "N", "S"), [(2, 37, 11), (1, 300, 300), (3, 4, 0), (0, 5, 2)])
def test_positions_are_the_inverse_of_indices(backend, device, B, N, S):
    indices = random_indices(B, N, S, num_empty=min(S, 2)).flip(1)

    positions = invert_indices(indices.to(device), N, backend=backend).cpu()

    assert positions.shape == (B, N)
    assert positions.dtype == torch.int32
    for b in range(B):
        wanted = [-1] * N
        for slot, token in enumerate(indices[b].tolist()):
            if token >= 0:
                wanted[token] = slot
        assert positions[b].tolist() == wanted


def test_inverting_skips_an_index_outside_the_tokens(backend, device):
    wild = torch.tensor([[9, 2, -1, 5, 2**31 - 1, -(2**31)]], dtype=torch.int32, device=device)

    positions = invert_indices(wild, 6, backend=backend)

    assert positions.tolist() == [[-1, -1, 1, -1, -1, 3]]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"scores": torch.zeros(9)}, r"scores must have shape \(B, N\) or \(L, B, N\), got \(9,\)"),
        ({"staleness": torch.zeros(2, 8, dtype=torch.int32)}, "staleness must have shape"),
        ({"staleness": torch.zeros(9, 2, dtype=torch.int32).T}, "staleness must"),
        ({"max_fresh": 10}, r"max_fresh must be in \[0, N = 9\], got 10"),
        ({"grid": (2, 4)}, r"grid must multiply to N = 9, got \(2, 4\)"),
        ({"tile": 0}, "tile must be at least 1, got 0"),
    ],
)
def test_an_argument_that_does_not_fit_is_named(change, sentence):
    arguments = {
        "scores": torch.zeros(2, 9),
        "staleness": torch.zeros(2, 9, dtype=torch.int32),
        "max_fresh": 3,
    }

    with pytest.raises(ValueError, match=f"^select_tokens_: {sentence}"):
        select_tokens_(**(arguments | change))


@pytest.mark.parametrize("largest", [1e-30, 1.0, 3e19, 3e38])
def test_scores_of_any_size_select_by_their_order_and_their_staleness(backend, device, largest):
    scores = distinct_scores(2, 2, 41, device=device)
    staleness = torch.zeros(2, 2, 41, dtype=torch.int32, device=device)
    staleness[..., 7] = 3

    def select(scores):
        return select_tokens(scores, staleness, 9, staleness_weight=0.3, backend=backend)

    indices, positions, _ = select(scores / 41 * largest)

    # a score below the least norm adds next to nothing to the staleness
    wanted = select(scores / 41)
    if largest == 1e-30:
        assert (indices == 7).any(-1).all()
    else:
        torch.testing.assert_close((indices, positions), wanted[:2], rtol=0, atol=0)


def test_a_cycle_of_no_steps_is_empty_and_leaves_the_staleness(backend, device):
    scores = distinct_scores(3, 2, 11, device=device)
    staleness = torch.ones(3, 2, 11, dtype=torch.int32, device=device)
    none = torch.zeros(0, 3, dtype=torch.int32, device=device)

    indices, positions = select_cycle_(scores, staleness, none, 4, backend=backend)

    assert indices.shape == (0, 3, 2, 4)
    assert positions.shape == (0, 3, 2, 11)
    assert (staleness == 1).all()
