"""The pages: the site builds strictly, every decision is listed, and the examples run."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_the_site_is_built_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")

    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(tmp_path)],
        cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    ops = (tmp_path / "ops.html").read_text()
    public = ("rows.gather_rows", "modulate.row_pass_", "attention.attention", "blend.blend")
    assert all(f'id="tokencache_kernels.ops.{name}"' in ops for name in public)


def test_every_decision_is_listed():
    listed = re.findall(r"\]\((0\d+-.*?\.md)\)", (ROOT / "docs" / "adr" / "index.md").read_text())

    assert listed == sorted(path.name for path in (ROOT / "docs" / "adr").glob("0*.md"))


def test_the_example_of_a_policy_runs():
    names = {}
    for code in re.findall(
        r"```python\n(.*?)```", (ROOT / "docs/add-a-policy.md").read_text(), re.S
    ):
        exec(code, names)

    assert names["plan"].flops_ratio > 2
    kinds = [step.is_full for step in names["plan"].steps]
    assert kinds[:4] == [True, False, False, True]
