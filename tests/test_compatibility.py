"""The page on compatibility lists what the tests show, and nothing else."""

import importlib.util
from pathlib import Path

import pytest

_SPEC = importlib.util.spec_from_file_location(
    "compatibility", Path(__file__).with_name("compatibility.py")
)
compatibility = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(compatibility)


def test_the_table_is_that_of_the_tests(request):
    items = request.session.items
    if not set(compatibility.FILES) <= {item.path.name for item in items}:
        pytest.skip("only a whole run collects every test that the table lists")
    page = compatibility.PAGE.read_text()

    assert page == compatibility.replace_table(page, compatibility.make_table(items)), (
        "run: python tests/compatibility.py"
    )
