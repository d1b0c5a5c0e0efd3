"""Plain English, as far as it can be counted: the rules of CONTRIBUTING on every sentence.

A violation is named by its file and its words. Code in backticks is not prose.
"""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
AREAS = [
    "tokencache_kernels", "csrc", "cmake", "tests", "benchmarks", "examples", "docs", "README.md",
    "CONTRIBUTING.md", "CHANGELOG.md", "setup.py",
]  # fmt: skip
FIRST_WORDS = re.compile(r"(What|How|Where|Of|Whether|Which|When)\b")
CODE = re.compile(r"```.*?```|``.*?``|`[^`\n]*`", re.DOTALL)
WHAT = re.compile(r"[^.:\n]*\bwhat\b[^.:\n]*", re.IGNORECASE)
# a field of Args, or an item of a list
ITEM = re.compile(r"\s*(- |\d+\. |\w[\w, *]*: )")


def list_files(area):
    """The files of an area that hold prose."""
    path = ROOT / area
    suffixes = (".py", ".md", ".h", ".cpp", ".c", ".cu", ".cuh")
    found = path.rglob("*") if path.is_dir() else [path]
    return sorted(
        file for file in found if file.suffix in suffixes and file.name != "test_prose.py"
    )


def read_docstrings(path):
    """The docstrings of a module, its classes and its functions."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, kinds)]
    return [text for text in map(ast.get_docstring, nodes) if text]


def read_comments(path):
    """The comments of a file, one text for those on consecutive lines."""
    text = path.read_text()
    if path.suffix == ".py":
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        found = [(t.start[0], t.string.lstrip("# ")) for t in tokens if t.type == tokenize.COMMENT]
    else:
        lines = enumerate(text.splitlines(), 1)
        matches = ((number, re.search(r'(?<![:"])//+\s*(.*)', line)) for number, line in lines)
        found = [(number, match[1]) for number, match in matches if match]
    texts, last = [], -2
    for number, words in found:
        if number == last + 1:
            texts[-1] += " " + words
        else:
            texts.append(words)
        last = number
    return texts


def read_page(path):
    """The paragraphs of a page, without its code and its tables."""
    text = re.sub(r"(?ms)^```.*?^```", "", path.read_text())
    text = re.sub(r"(?s)<!-- table: .*?<!-- end of table -->", "", text)
    return [part for part in text.split("\n\n") if not part.lstrip().startswith(("|", "<", "#"))]


def read_texts(path):
    """Everything in a file that a person reads."""
    if path.suffix == ".md":
        return read_page(path)
    return [*(read_docstrings(path) if path.suffix == ".py" else ()), *read_comments(path)]


def split_paragraphs(text):
    """The paragraphs, fields and items of a text, without code."""
    parts = []
    for block in CODE.sub("x", text).split("\n\n"):
        lines = block.splitlines()
        starts = [i for i, line in enumerate(lines) if i == 0 or ITEM.match(line)]
        parts += [" ".join(lines[a:b]) for a, b in zip(starts, [*starts[1:], None], strict=False)]
    return parts


@pytest.mark.parametrize("area", AREAS)
def test_a_docstring_begins_with_a_verb_or_a_noun(area):
    files = [path for path in list_files(area) if path.suffix == ".py"]

    found = [
        f"{path.relative_to(ROOT)}: {text.splitlines()[0]}"
        for path in files
        for text in read_docstrings(path)
        if FIRST_WORDS.match(text)
    ]

    assert found == []


@pytest.mark.parametrize("area", AREAS)
def test_things_are_named_by_nouns(area):
    words, found = 0, []
    for path in list_files(area):
        for text in (CODE.sub("x", text) for text in read_texts(path)):
            words += len(text.split())
            found += [f"{path.relative_to(ROOT)}: {part}" for part in re.findall(WHAT, text)]

    # one clause of "what is ..." in 1,000 words; the field has 0.03 to 0.19
    assert len(found) <= max(words // 1000, 1), found


@pytest.mark.parametrize("area", AREAS)
def test_a_paragraph_has_at_most_one_semicolon(area):
    found = [
        f"{path.relative_to(ROOT)}: {part}"
        for path in list_files(area)
        for text in read_texts(path)
        for part in split_paragraphs(text)
        # a field is a list of facts: dtype; layout; range
        if part.count(";") > (2 if ITEM.match(part) else 1)
    ]

    assert found == []


@pytest.mark.parametrize("area", [area for area in AREAS if area != "CONTRIBUTING.md"])
def test_a_word_is_repeated_rather_than_replaced(area):
    found = [
        f"{path.relative_to(ROOT)}: {text}"
        for path in list_files(area)
        for text in read_texts(path)
        if re.search(r"\blikewise\b", text, re.IGNORECASE)
    ]

    assert found == []


def test_the_example_of_a_commit_follows_its_own_rule():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    (example,) = re.findall(r"`(\w+: [a-z][^`]+)`", text)

    assert len(example) <= 72
    assert not example.endswith(".")
