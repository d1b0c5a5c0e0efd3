"""Call the native library from NumPy, through ctypes: neither torch nor this package is imported.

    python examples/numpy_ctypes.py [path of libtokencache.so]

A structure of ctypes has the fields of the C structure in ``tokencache.h``, in its order.
"""

import ctypes
import importlib.util
import sys
from ctypes import POINTER, c_char_p, c_int32, c_int64, c_void_p
from pathlib import Path

import numpy as np

DTYPES = {"float32": 1, "float16": 2, "float64": 4}  # NumPy has no bfloat16
CPU = 0


class GatherRows(ctypes.Structure):
    """``tokencache_gather_rows_args``."""

    _fields_ = (
        [(name, c_int64) for name in ("B", "N", "S", "D")]
        + [("dtype", c_int32)]
        + [(name, c_void_p) for name in ("x", "indices", "out")]
        + [(name, c_int64) for name in ("stride_x_b", "stride_x_n", "stride_indices_b")]
    )


class ScatterRows(ctypes.Structure):
    """``tokencache_scatter_rows_args``."""

    _fields_ = (
        [(name, c_int64) for name in ("B", "N", "S", "D")]
        + [("dtype", c_int32)]
        + [(name, c_void_p) for name in ("rows", "indices", "cache")]
        + [(name, c_int64) for name in ("stride_rows_b", "stride_rows_s", "stride_indices_b")]
        + [(name, c_int64) for name in ("stride_cache_b", "stride_cache_n")]
    )


class Tokencache:
    """Two ops on NumPy arrays; a mistake raises ValueError with the library's sentence."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self._library.tokencache_error.restype = c_char_p
        for name, struct in (("gather_rows", GatherRows), ("scatter_rows", ScatterRows)):
            function = getattr(self._library, f"tokencache_{name}")
            function.argtypes = [POINTER(struct), c_int32, c_void_p]

    def gather_rows(self, x: np.ndarray, indices: np.ndarray) -> np.ndarray:
        """out[b, s] = x[b, indices[b, s]]; an empty slot: 0."""
        (B, N, D), S = x.shape, indices.shape[1]
        out = np.empty((B, S, D), x.dtype)
        args = GatherRows(
            B, N, S, D, DTYPES[x.dtype.name], x.ctypes.data, indices.ctypes.data, out.ctypes.data,
            *_strides(x), _strides(indices)[0],
        )  # fmt: skip
        self._call("gather_rows", args)
        return out

    def scatter_rows_(self, cache: np.ndarray, indices: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """cache[b, indices[b, s]] = rows[b, s], in place."""
        (B, N, D), S = cache.shape, indices.shape[1]
        if rows.shape != (B, S, D) or rows.dtype != cache.dtype:
            raise ValueError(f"scatter_rows: rows must fit the cache, got {rows.shape}")
        args = ScatterRows(
            B, N, S, D, DTYPES[cache.dtype.name],
            rows.ctypes.data, indices.ctypes.data, cache.ctypes.data,
            *_strides(rows), _strides(indices)[0], *_strides(cache),
        )  # fmt: skip
        self._call("scatter_rows", args)
        return cache

    def _call(self, op: str, args: ctypes.Structure) -> None:
        if getattr(self._library, f"tokencache_{op}")(ctypes.byref(args), CPU, None) != 0:
            raise ValueError(self._library.tokencache_error().decode())


def _strides(array: np.ndarray) -> list[int]:
    """In elements, of all dimensions but the last, along which there must be no gap."""
    if array.shape[-1] > 1 and array.strides[-1] != array.itemsize:
        raise ValueError(f"the last stride must be {array.itemsize}, got {array.strides[-1]}")
    return [stride // array.itemsize for stride in array.strides[:-1]]


def find_library() -> Path:
    """Where an installed ``tokencache_kernels`` has the C library, found without importing it."""
    package = importlib.util.find_spec("tokencache_kernels")
    if package is None or package.origin is None:
        raise SystemExit("tokencache_kernels is not installed: name the library's path")
    return Path(package.origin).with_name("lib") / "libtokencache.so"


def main() -> None:
    """Gather the selected rows of a batch, change them, and scatter them back."""
    library = Tokencache(Path(sys.argv[1]) if len(sys.argv) > 1 else find_library())
    rng = np.random.default_rng(0)
    cache = rng.standard_normal((2, 64, 96), dtype=np.float32)
    indices = np.sort(rng.permuted(np.tile(np.arange(64, dtype=np.int32), (2, 1)), axis=1)[:, :16])
    indices[1, -1] = -1  # an empty slot

    rows = library.gather_rows(cache, indices)
    wanted = np.take_along_axis(cache, indices[..., None], axis=1)
    wanted[1, -1] = 0
    assert np.array_equal(rows, wanted)

    before = cache.copy()
    library.scatter_rows_(cache, indices, 2 * rows)
    for b, s in np.argwhere(indices >= 0):
        before[b, indices[b, s]] *= 2
    assert np.array_equal(cache, before)

    try:
        library.gather_rows(cache, np.zeros((2, 65), np.int32))
    except ValueError as error:
        print(f"refused, as it should be: {error}")
    print("gathered and scattered from NumPy")


if __name__ == "__main__":
    main()
