"""The order of dependence, and the imports of the package."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import tokencache_kernels

PACKAGE = Path(tokencache_kernels.__file__).parent
# a layer may import those before it
LAYERS = [
    "version", "errors", "settings", "cache", "backends", "ops", "models", "policies", "blocks",
    "integrations", "learn", "testing", "commands", "demo", "__main__",
]  # fmt: skip
FILES = sorted(PACKAGE.rglob("*.py"))


def layer_of(parts):
    return LAYERS.index(parts[0].removesuffix(".py")) if parts else -1


def imported_parts(path, node):
    """The package-relative path that an import names, or None for other packages."""
    if isinstance(node, ast.ImportFrom) and node.level:
        folder = list(path.relative_to(PACKAGE).parent.parts)
        base = folder[: len(folder) - (node.level - 1)]
        module = node.module.split(".") if node.module else []
        return [*base, *module] or [node.names[0].name]
    names = [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
    for name in names:
        if name and name.startswith("tokencache_kernels."):
            return name.split(".")[1:]
    return None


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    own = path.relative_to(PACKAGE).parts
    if own == ("__init__.py",):
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            parts = imported_parts(path, node)
            # the reference is the specification: the ops know it by name
            if parts:
                assert layer_of(parts) <= layer_of(own), f"{path}:{node.lineno} imports {parts}"


@pytest.mark.parametrize(
    ("statement", "banned"),
    [
        ("import tokencache_kernels", ("torch", "triton", "diffusers")),
        ("import tokencache_kernels.ops", ("triton", "diffusers", "matplotlib")),
        ("import tokencache_kernels.policies", ("triton", "diffusers")),
        ("import tokencache_kernels.commands.cli", ("torch", "triton", "diffusers", "matplotlib")),
    ],
)
def test_an_import_does_not_pull_in_what_it_does_not_need(statement, banned):
    code = f"import sys; {statement}; print([m for m in {banned!r} if m in sys.modules])"

    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert out.stdout.strip() == "[]"


def test_every_public_name_can_be_had():
    for name in tokencache_kernels.__all__:
        assert getattr(tokencache_kernels, name) is not None


def test_the_lazy_names_and_the_public_names_are_the_same():
    assert set(tokencache_kernels._HOME_OF) == set(tokencache_kernels.__all__) - {"__version__"}


@pytest.mark.parametrize("folder", ["cpu", "cuda"])
def test_kernels_in_cpp_do_not_know_torch(folder):
    for path in (PACKAGE.parent / "csrc" / folder).rglob("*.*"):
        assert "torch" not in path.read_text(), path
