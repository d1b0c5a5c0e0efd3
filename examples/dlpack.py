"""Call the ops on another framework's arrays: DLPack hands the memory over, nothing is copied.

python examples/dlpack.py
"""

import importlib.util

import numpy as np
import torch

import tokencache_kernels as tck


def from_numpy() -> None:
    """Scatter into a NumPy array, through a tensor on the same memory."""
    cache = np.zeros((1, 8, 4), np.float32)
    indices = np.array([[6, 2]], np.int32)
    rows = np.ones((1, 2, 4), np.float32)

    tck.scatter_rows_(*map(torch.from_dlpack, (cache, indices, rows)))
    assert cache[0].any(axis=1).nonzero()[0].tolist() == [2, 6]

    gathered = np.from_dlpack(tck.gather_rows(*map(torch.from_dlpack, (cache, indices))))
    assert np.array_equal(gathered, rows)


def from_jax() -> None:
    """Gather rows of a JAX array into a JAX array. JAX's own memory must not be written."""
    import jax
    import jax.numpy as jnp

    x = jnp.arange(32.0).reshape(1, 8, 4)
    indices = jnp.array([[6, 2]], jnp.int32)

    out = jax.dlpack.from_dlpack(tck.gather_rows(*map(torch.from_dlpack, (x, indices))))
    assert (out == x[:, indices[0]]).all()


def from_cupy() -> None:
    """Scatter into a CuPy array on the GPU."""
    import cupy

    cache = cupy.zeros((1, 8, 4), cupy.float32)
    indices = cupy.array([[6, 2]], cupy.int32)
    rows = cupy.ones((1, 2, 4), cupy.float32)

    tck.scatter_rows_(*map(torch.from_dlpack, (cache, indices, rows)))
    assert cache[0].any(axis=1).nonzero()[0].tolist() == [2, 6]


def main() -> None:
    """Run what is installed."""
    for name, example in (("numpy", from_numpy), ("jax", from_jax), ("cupy", from_cupy)):
        if importlib.util.find_spec(name) is None:
            print(f"{name}: not installed")
        elif name == "cupy" and not torch.cuda.is_available():
            print(f"{name}: needs a GPU")
        else:
            example()
            print(f"{name}: gathered and scattered")


if __name__ == "__main__":
    main()
