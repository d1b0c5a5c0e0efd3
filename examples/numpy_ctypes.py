"""A partial step in NumPy, through ctypes: neither torch nor this package is imported.

    python examples/numpy_ctypes.py [path of libtokencache.so]

A structure of ctypes has the fields of the C structure in ``tokencache.h``, in its order.
"""

import ctypes
import importlib.util
import sys
from ctypes import c_char_p, c_double, c_float, c_int32, c_int64, c_void_p
from pathlib import Path

import numpy as np

FLOAT32 = 1
CPU = 0


def _define(name: str, *fields: tuple[type, str]) -> type[ctypes.Structure]:
    """A structure: each type with the names that have it, one after another."""
    flat = [(field, kind) for kind, names in fields for field in names.split()]
    return type(name, (ctypes.Structure,), {"_fields_": flat})


Branch = _define(
    "tokencache_branch",
    (c_void_p, "branch gate"),
    (c_int64, "stride_branch_b stride_branch_n stride_gate_b"),
)
STRUCTURES = {
    "gather_rows": _define(
        "tokencache_gather_rows_args",
        (c_int64, "B N S D"),
        (c_int32, "dtype"),
        (c_void_p, "x indices out"),
        (c_int64, "stride_x_b stride_x_n stride_indices_b"),
    ),
    "scatter_rows": _define(
        "tokencache_scatter_rows_args",
        (c_int64, "B N S D"),
        (c_int32, "dtype"),
        (c_void_p, "rows indices cache"),
        (c_int64, "stride_rows_b stride_rows_s stride_indices_b stride_cache_b stride_cache_n"),
    ),
    "row_pass": _define(
        "tokencache_row_pass_args",
        (c_int64, "B N S D"),
        (c_int32, "dtype"),
        (c_double, "eps"),
        (c_void_p, "x branches"),
        (c_int64, "num_branches"),
        (c_void_p, "indices positions shift scale out packed"),
        (c_int64, "stride_x_b stride_x_n stride_indices_b stride_shift_b stride_scale_b"),
        (c_int64, "stride_out_b stride_out_n"),
    ),
    "select_tokens": _define(
        "tokencache_select_tokens_args",
        (c_int64, "L B N P max_fresh"),
        (c_float, "staleness_weight"),
        (c_int32, "normalize"),
        (c_int64, "grid_height grid_width tile"),
        (c_float, "bonus"),
        (c_void_p, "scores num_fresh staleness indices positions workspace"),
        (c_int64, "stride_staleness_l stride_staleness_b workspace_bytes"),
    ),
}


class Tokencache:
    """The ops of a partial step on NumPy arrays; a mistake raises with the library's sentence."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self._library.tokencache_error.restype = c_char_p

    def select_tokens_(
        self, scores: np.ndarray, staleness: np.ndarray, max_fresh: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Indices and positions of the best tokens of each sample, in one layer (1, B, N)."""
        _, B, N = scores.shape
        indices, positions = np.empty((B, max_fresh), np.int32), np.empty((B, N), np.int32)
        self._call(
            "select_tokens", L=1, B=B, N=N, P=1, max_fresh=max_fresh, normalize=1,
            scores=scores, staleness=staleness, indices=indices, positions=positions,
        )  # fmt: skip
        return indices, positions

    def row_pass_(
        self, x: np.ndarray, branch: np.ndarray, gate: np.ndarray, indices: np.ndarray,
        shift: np.ndarray, scale: np.ndarray,
    ) -> np.ndarray:  # fmt: skip
        """x += gate * branch; the selected rows come back packed, normalised and modulated."""
        (B, N, D), S = x.shape, indices.shape[1]
        packed = np.empty((B, S, D), np.float32)
        one = _fill(Branch, branch=branch, gate=gate)
        self._call(
            "row_pass", B=B, N=N, S=S, D=D, dtype=FLOAT32, eps=1e-6, num_branches=1,
            branches=ctypes.addressof(one), x=x, out=x, packed=packed, indices=indices,
            shift=shift, scale=scale,
        )  # fmt: skip
        return packed

    def scatter_rows_(self, cache: np.ndarray, indices: np.ndarray, rows: np.ndarray) -> None:
        """cache[b, indices[b, s]] = rows[b, s]."""
        (B, N, D), S = cache.shape, indices.shape[1]
        self._call(
            "scatter_rows", B=B, N=N, S=S, D=D, dtype=FLOAT32,
            rows=rows, indices=indices, cache=cache,
        )  # fmt: skip

    def gather_rows(self, x: np.ndarray, indices: np.ndarray) -> np.ndarray:
        """out[b, s] = x[b, indices[b, s]]; an empty slot: 0."""
        (B, N, D), S = x.shape, indices.shape[1]
        out = np.empty((B, S, D), np.float32)
        self._call("gather_rows", B=B, N=N, S=S, D=D, dtype=FLOAT32, x=x, indices=indices, out=out)
        return out

    def _call(self, op: str, **values: object) -> None:
        args = _fill(STRUCTURES[op], **values)
        if getattr(self._library, f"tokencache_{op}")(ctypes.byref(args), CPU, None) != 0:
            raise ValueError(self._library.tokencache_error().decode())


def _fill(structure: type[ctypes.Structure], **values: object) -> ctypes.Structure:
    """A structure with these values: of an array its address and its strides, in elements."""
    args = structure()
    for name, value in values.items():
        if isinstance(value, np.ndarray):
            strides = [field for field, _ in structure._fields_ if f"stride_{name}_" in field]
            for field, stride in zip(strides, value.strides, strict=False):
                setattr(args, field, stride // value.itemsize)
            value = value.ctypes.data
        setattr(args, name, value)
    return args


def find_library() -> Path:
    """Find the C library of an installed ``tokencache_kernels``, without importing it."""
    package = importlib.util.find_spec("tokencache_kernels")
    if package is None or package.origin is None:
        raise SystemExit("tokencache_kernels is not installed: name the library's path")
    return Path(package.origin).with_name("lib") / "libtokencache.so"


def main() -> None:
    """One partial step; each part is compared with NumPy's result."""
    library = Tokencache(Path(sys.argv[1]) if len(sys.argv) > 1 else find_library())
    B, N, S, D = 2, 64, 16, 96
    rng = np.random.default_rng(0)
    x, cache = (rng.standard_normal((B, N, D), np.float32) for _ in range(2))
    gate, shift, scale = (rng.standard_normal((B, D), np.float32) for _ in range(3))
    scores, staleness = rng.random((1, B, N), np.float32), np.full((1, B, N), 3, np.int32)

    indices, positions = library.select_tokens_(scores, staleness, S)
    assert np.array_equal(indices, np.sort(np.argsort(scores[0])[:, -S:]))
    assert np.array_equal(staleness[0], np.where(positions < 0, 4, 0))

    summed = x + gate[:, None] * cache
    packed = library.row_pass_(x, cache, gate, indices, shift, scale)
    assert np.allclose(x, summed, atol=1e-6)
    rows = np.take_along_axis(summed, indices[..., None], axis=1)
    rows = (rows - rows.mean(2, keepdims=True)) / np.sqrt(rows.var(2, keepdims=True) + 1e-6)
    assert np.allclose(packed, rows * (1 + scale[:, None]) + shift[:, None], atol=1e-5)

    # a model would now run its MLP on the packed rows; here they go into the cache as they are
    stale = cache.copy()
    library.scatter_rows_(cache, indices, packed)
    assert np.array_equal(cache[positions < 0], stale[positions < 0])
    assert np.array_equal(library.gather_rows(cache, indices), packed)

    try:
        library.gather_rows(cache, np.zeros((B, N + 1), np.int32))
    except ValueError as error:
        print(f"refused, as it should be: {error}")
    print("selected, passed, scattered and gathered from NumPy")


if __name__ == "__main__":
    main()
