"""What README and docs claim: rendered from records, commands parse, snippets run, links lead."""

import json
import re
from functools import cache

import pytest

import saccade
from saccade.cli.main import parse
from saccade.report.comparison import Claim, SweepPoint
from scripts import page_pictures, page_tables, publish_pages, publish_record
from tests.docs.pages import PAGES, RENDERED, ROOT, anchors, blocks, commands, links, prose
from tests.report.sample import report

TECHNIQUES = [
    f"docs/{name}.md"
    for name in (
        "flash-attention", "sliding-window", "sparse", "yarn", "compression", "quantized-kv",
    )
]  # fmt: skip
LONGEST_PAGE = 80  # without its tables
# Shares that follow from numbers of heads; what the GQA paper trains on with.
_HEADS = ((9, 3), (9, 1), (32, 8), (32, 1))
EXACT = {"docs/kv-heads.md": {"5 %", *(f"{100 - 100 * kv / heads:.0f} %" for heads, kv in _HEADS)}}


COMMANDS = [
    pytest.param(words, id=f"{page}: {' '.join(words)}")
    for page, text in PAGES.items()
    for words in commands(text)
]


@pytest.mark.parametrize("page", PAGES)
def test_figures_are_the_stored_records(page):
    text = PAGES[page]
    assert publish_record.published(text) == text
    assert publish_pages.published(text) == text


@pytest.mark.parametrize("page", PAGES)
def test_every_record_that_is_shown_exists(page):
    assert not publish_pages.missing(PAGES[page])


@pytest.mark.parametrize("name", page_pictures.PICTURES)
def test_pictures_are_what_is_drawn(name):
    assert (ROOT / "docs/img" / name).read_text() == page_pictures.PICTURES[name]()


@pytest.mark.parametrize("page", PAGES)
def test_no_measurement_is_typed_by_hand(page):
    unit = r"%|TFLOP/s|GF/s|[GM]B/s|µs|ms|nats|tokens/s|x|times(?= (?:the speed|faster|slower))"
    typed = re.findall(rf"\b\d[\d.,]* ?(?:{unit})(?![\w-])", prose(PAGES[page]))
    assert not set(typed) - EXACT.get(page, set())


@pytest.mark.parametrize("words", COMMANDS)
def test_commands_parse(words):
    assert parse(words).info_name.startswith(f"saccade {words[0]}")


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for path, anchor in links(PAGES[page]):
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), path
        if anchor:
            assert anchor in anchors(target.read_text()), f"{path}#{anchor}"


@pytest.mark.parametrize("page", TECHNIQUES)
def test_a_page_of_a_technique_has_everything(page):
    text = PAGES[page]
    assert len(RENDERED.sub("", text).splitlines()) <= LONGEST_PAGE
    for part in ("**What it does.**", "**When to use it.**", "**When not.**"):
        assert part in text or page == "docs/compression.md"
    assert "## Use it" in text and "## What it measured here" in text
    assert commands(text) and blocks(text, "python") and re.search(r"!\[.*\]\(img/.*\.svg\)", text)


@pytest.fixture(scope="module")
def _model_is_loaded_once():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saccade, "load_model", cache(saccade.load_model), raising=False)
        yield


@pytest.mark.real_model
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(PAGES[page], "python")])
@pytest.mark.usefixtures("_model_is_loaded_once")
def test_snippets_run(page, capsys, tmp_path, monkeypatch):
    scope = {}
    monkeypatch.chdir(tmp_path)
    for code in blocks(PAGES[page], "python"):
        if re.search(r"^ +\.\.\.", code, re.MULTILINE):
            continue  # a sketch, which leaves out what the reader puts there
        exec(compile(code, page, "exec"), scope)
    assert page != "README.md" or "Paris" in capsys.readouterr().out


def test_a_missing_record_is_named_and_an_unknown_row_is_refused():
    assert "does not exist" in publish_pages.shown("rows", "benchmarks/results/none.json")
    with pytest.raises(ValueError, match="has no row 'no such row'; it has"):
        publish_pages.shown("rows", "benchmarks/results/caches-smollm2.json", "no such row")


def test_a_sweep_is_a_table_by_length(tmp_path):
    record, path = report(), tmp_path / "record.json"
    record.sweep = [
        SweepPoint(name="int8 KV", n_context=1024, cache_bytes=2**20),
        SweepPoint(name="int8 KV", n_context=4096, status="failed", note="no memory"),
        SweepPoint(name="other", n_context=1024, cache_bytes=1),
    ]
    record.write(path)
    table = page_tables.sweep(path, "cache_bytes", "int8")
    assert table.splitlines()[0] == "| cache | 1k | 4k |"
    assert table.splitlines()[2:] == ["| int8 KV | 1.00 MiB | failed |"]
    with pytest.raises(ValueError, match="has no 'none', only int8 KV, other"):
        page_tables.sweep(path, "kl", "none")


def test_plans_stand_beside_what_was_measured(tmp_path):
    plan = {"caches": 2**20, "peak": 2**30, "first_token": 2.0, "tokens_per_second": 50.0}
    off = {"caches": 0.0, "peak": 0.0, "first_token": -0.2, "tokens_per_second": 0.0}
    rows = [
        {"name": "int8", "tokens": 2048, "plan": plan, "measured": plan | {"first_token": 2.5},
         "off": off},
        {"name": "int4", "tokens": 2048, "failed": "MemoryError"},
    ]  # fmt: skip
    path = tmp_path / "record.json"
    path.write_text(json.dumps({"rows": rows}))
    int8, int4 = page_tables.plan_check(path).splitlines()[2:]
    assert int8.startswith("| int8 | 2,048 | 1.00 MiB / 1.00 MiB (+0%) | ")
    assert "2.00 s / 2.50 s (-20%)" in int8
    assert int4 == "| int4 | 2,048 | – | – | – | – |"


def test_claims_stand_beside_what_was_measured(tmp_path):
    record, path = report(), tmp_path / "record.json"
    record.claims = [
        Claim(technique="GQA", quantity="memory", claimed="75 %", measured="67 %", reason="3 heads")
    ]
    record.write(path)
    assert page_tables.claims(path).endswith("| GQA | memory | 75 % | 67 % | 3 heads |")


def test_rows_of_a_comparison_come_with_its_references(tmp_path):
    record, path = report(), tmp_path / "record.json"
    record.write(path)
    table = page_tables.rows(path, "window")
    names = [row.name for row in record.rows]
    shown = [name for name in names if f"| {name}" in table]
    wanted = ("window", record.baseline, record.reference)
    assert shown == [name for name in names if name.startswith(wanted)]


def test_a_hand_typed_number_is_found():
    assert "653 TFLOP/s" in prose("It reaches 653 TFLOP/s, see `1 ms`.")
    assert "1 ms" not in prose("It reaches 653 TFLOP/s, see `1 ms`.")
