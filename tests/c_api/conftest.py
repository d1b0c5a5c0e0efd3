"""Return the path of the C library."""

import os
from pathlib import Path

import pytest

import tokencache_kernels

PACKAGE = Path(tokencache_kernels.__file__).parent


@pytest.fixture(scope="session")
def library_path():
    """Return the path of the installed library, or of the one that `make sanitize` names."""
    path = Path(os.environ.get("TOKENCACHE_C_LIBRARY", PACKAGE / "lib" / "libtokencache.so"))
    if not path.is_file():
        pytest.skip("the C library is not installed (make setup)")
    return path
