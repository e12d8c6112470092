"""Every causal language model class of the installed transformers, against docs/families.json."""

from __future__ import annotations

import json

import pytest
import transformers

from scripts.families import COLUMNS, PAGE, RECORD, cell, rendered, row, settled
from scripts.family_configs import FAMILIES

KNOWN = json.loads(RECORD.read_text())
ROWS = KNOWN["families"]
CHECKED = ("attach", "plain", "check")
"""What the installed version is asked for every family; of the other columns, one for each."""
IN_TURN = ("window", "yarn", "session", "shift")
CHUNKS = 16


def kind(said: str) -> str:
    return said.partition(":")[0]


def test_no_family_is_missing():
    newer = transformers.__version__ > KNOWN["transformers"]
    assert newer or set(FAMILIES) <= set(ROWS)


def test_page_shows_the_record():
    assert PAGE.read_text() == rendered(KNOWN)


@pytest.mark.parametrize("column", COLUMNS)
def test_every_family_is_right_or_refused(column):
    words = {name: kind(cell(found, column)) for name, found in ROWS.items()}
    assert {n: w for n, w in words.items() if w not in ("exact", "near", "refused", "-")} == {}


def test_most_families_are_exact():
    exact = [name for name, found in ROWS.items() if cell(found, "plain") == "exact"]
    said = [name for name, found in ROWS.items() if kind(cell(found, "plain")) == "refused"]
    assert len(exact) >= 120 and len(exact) + len(said) >= 150


def test_the_self_check_refuses_no_family_that_is_exact():
    """It runs whenever a Context is opened, so it must not stand in the way of a right model."""
    exact = {name: found for name, found in ROWS.items() if cell(found, "plain") == "exact"}
    assert [name for name, found in exact.items() if cell(found, "check") != "exact"] == []


@pytest.mark.parametrize("chunk", range(CHUNKS))
@pytest.mark.filterwarnings("ignore")
def test_installed_families_are_what_the_record_says(chunk):
    same_version = transformers.__version__ == KNOWN["transformers"]
    for turn, name in enumerate(FAMILIES[chunk::CHUNKS]):
        columns = (*CHECKED, IN_TURN[(chunk + turn) % len(IN_TURN)])
        found = settled(row(name, columns))
        for column in columns:
            if (name, column) == ("moshi", "attach") and not same_version:
                continue  # transformers 5.16 names a window that its own eager attention ignores
            now, then = kind(cell(found, column)), kind(cell(ROWS[name], column))
            assert now in ("exact", "refused", "-"), f"{name}: {cell(found, column)}"
            assert now == then or not same_version, f"{name}: {cell(found, column)}"


def test_columns_of_the_page():
    assert {*CHECKED, *IN_TURN, "int8"} == set(COLUMNS)
