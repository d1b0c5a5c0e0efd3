"""Files of trained policies: replaced as a whole, and checked before they are believed."""

import os
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import fail


def replace_file(path: Path, content: bytes) -> None:
    """Write a file so that whoever looks finds all of the old one or all of the new one."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    # the new name too must outlive a loss of power
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def load_safetensors(
    path: str | Path, op: str, argument: str, format_name: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors and the metadata of a file of ours; nothing in a file is ever executed.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is truncated, or of another format.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).exists():
        raise FileNotFoundError(f"{op}: {argument} must be a file, got {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{op}: {argument} must be a whole safetensors file, got {path} ({error})"
        ) from error
    if metadata.get("format") != format_name:
        fail(op, argument, f"be a {format_name}", f"{path} of format {metadata.get('format')}")
    return tensors, metadata
