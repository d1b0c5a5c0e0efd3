"""Call the ops on another framework's arrays: DLPack hands the memory over, nothing is copied.

python examples/dlpack.py
"""

import importlib
from types import ModuleType

import numpy as np
import torch

import tokencache_kernels as tck

B, N, S, D = 2, 64, 16, 96


def take_partial_step(xp: ModuleType) -> None:
    """Select tokens, pass all rows, scatter the packed ones and gather them, on arrays of ``xp``.

    Args:
        xp: a module with NumPy's names: ``numpy``, ``jax.numpy`` or ``cupy``.
    """
    rng = np.random.default_rng(0)

    def make_random(*shape: int) -> object:
        return xp.asarray(rng.standard_normal(shape, dtype=np.float32))

    x, cache = make_random(B, N, D), make_random(B, N, D)
    gate, shift, scale = (make_random(B, D) for _ in range(3))
    scores, staleness = make_random(1, B, N), xp.zeros((1, B, N), xp.int32)
    give, take = torch.from_dlpack, xp.from_dlpack

    (indices,), (positions,), _ = tck.select_tokens(give(scores), give(staleness), S)
    out, packed = tck.row_pass(
        give(x), [give(cache)], [give(gate)], indices, give(shift), give(scale), positions=positions
    )
    fresh = tck.scatter_rows(give(cache), indices, packed)
    rows = tck.gather_rows(fresh, indices)

    best = xp.sort(xp.argsort(scores[0], axis=1)[:, -S:], axis=1)
    assert xp.array_equal(take(indices), best)
    assert xp.allclose(take(out), x + gate[:, None] * cache, atol=1e-6)
    assert xp.array_equal(take(rows), take(packed))
    # JAX's arrays never change; those of the others may be written
    if xp.__name__ != "jax.numpy":
        tck.scatter_rows_(give(cache), indices, packed)
        assert xp.array_equal(cache, take(fresh))


def main() -> None:
    """Run the installed package."""
    for name in ("numpy", "jax.numpy", "cupy"):
        if name == "cupy" and not torch.cuda.is_available():
            print(f"{name}: needs a GPU")
            continue
        try:
            xp = importlib.import_module(name)
        except ImportError:
            print(f"{name}: not installed")
            continue
        take_partial_step(xp)
        print(f"{name}: selected, passed, scattered and gathered")


if __name__ == "__main__":
    main()
