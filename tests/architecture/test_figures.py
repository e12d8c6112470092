"""Figures that the house keeps: sizes of files and functions, docstrings, the weight of tests."""

import ast
from statistics import median

import pytest

from tests.architecture.source import (
    ROOT,
    code_lines,
    functions,
    modules,
    public_definitions,
)

DRAWERS = {"utils", "util", "common", "misc", "helpers", "base_utils"}
LONGEST_FILE, LONGEST_FUNCTION, LONGEST_KERNEL, MEDIAN_FUNCTION = 400, 60, 120, 8
TESTS_PER_CODE = 0.6


def source_files():
    for folder in ("saccade", "csrc", "tests", "benchmarks", "scripts", "lab"):
        for ending in ("*.py", "*.h", "*.cpp"):
            yield from sorted((ROOT / folder).rglob(ending))


def test_files_fit_on_a_few_screens():
    sizes = {path: len(path.read_text().splitlines()) for path in source_files()}
    wrong = [
        f"{path.relative_to(ROOT)}: {n} lines" for path, n in sizes.items() if n > LONGEST_FILE
    ]
    assert not wrong, "\n".join(wrong)


def test_functions_fit_on_a_screen():
    wrong = [
        f"{f.where} {f.name}: {f.length} lines"
        for f in functions()
        if f.length > (LONGEST_KERNEL if f.is_kernel else LONGEST_FUNCTION)
    ]
    assert not wrong, "\n".join(wrong)


def test_functions_are_short():
    assert median(f.length for f in functions() if not f.is_kernel) <= MEDIAN_FUNCTION


def test_no_drawer_modules():
    wrong = [name for name in modules() if DRAWERS & set(name.split("."))]
    assert not wrong, "\n".join(wrong)


def test_what_is_public_is_documented():
    wrong = [where for where, node in public_definitions() if not ast.get_docstring(node)]
    assert not wrong, "\n".join(sorted(set(wrong)))


def test_tests_weigh_enough():
    code = sum(code_lines(path) for path in modules().values())
    tests = sum(code_lines(path) for path in (ROOT / "tests").rglob("*.py"))
    assert tests >= TESTS_PER_CODE * code, f"{tests} lines of tests for {code} lines of code"


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("", 0),
        ('"""Doc."""\n\nx = 1  # why\n', 1),
        ("# only a comment\n", 0),
        ("x = (\n1,\n)\n", 3),
    ],
)
def test_lines_of_code(tmp_path, text, lines):
    path = tmp_path / "x.py"
    path.write_text(text)
    assert code_lines(path) == lines
