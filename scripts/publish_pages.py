"""Render what the pages under docs/ show of stored records: tables, numbers in sentences, pictures.

What the package itself keeps of records (saccade/advice/*.json) is written again before.

python -m scripts.publish_pages

Marks in a page say what stands there; what is between them is rendered again:

    <!-- show: rows RECORD "flash" "window" -->     rows of a record whose names begin like this
    <!-- show: sweep RECORD kl "flash" -->          one quantity of a comparison's sweep by length
    <!-- show: claims RECORD -->                    the chapter's figures beside the measured ones
    <!-- show: far RECORD -->                       what `benchmarks.far` measured
    <!-- show: conversion RECORD -->                what `saccade convert` measured
    <!-- show: scores RECORD -->                    what `saccade eval` scored
    <!-- show: whole_model RECORD MODEL -->         a whole model beside llama.cpp and transformers
    <!-- show: whole_model_bars RECORD MODEL -->    what was aimed at there, and what was reached
    <!-- show: whole_model_kl RECORD -->            how far each form of weights moves predictions
    <!-- show: generate RECORD -->                  `generate()` on a GPU, by batch and length
    <!-- show: cpu_rules RECORD -->                 what `saccade bench tune` measured on a CPU
    <!-- show: planned SHAPE TOKENS -->             what `saccade.plan` says of a shape
    <!-- end of show -->
    <!-- fact: NAME -->a number<!-- end of fact -->  a sentence's number, see `page_facts`

A record that does not exist yet is named in place of its table.  `scripts.publish_record` renders
whole records between its own marks.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from benchmarks.plan_check import RESULTS, blueprint_of_shape
from saccade.advice import calls, evidence, gpu_fit
from scripts import page_facts, page_pictures, page_plans, page_tables

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(<!-- show: (.+?) -->\n)(.*?)(<!-- end of show -->)", re.DOTALL)
FACT = re.compile(r"(<!-- fact: (\w+) -->)(.*?)(<!-- end of fact -->)", re.DOTALL)


def published(text: str) -> str:
    """A page with everything between its marks rendered again."""
    text = BLOCK.sub(lambda m: m[1] + shown(*shlex.split(m[2])) + m[4], text)
    return FACT.sub(lambda m: m[1] + page_facts.FACTS[m[2]]() + m[4], text)


def shown(kind: str, record: str, *words: str) -> str:
    """What a mark stands for, as Markdown; ends with a newline."""
    if kind == "planned":
        return page_plans.planned(record, *words)
    if not (ROOT / record).exists():
        return f"*Not measured yet: `{record}` does not exist.*\n"
    table = page_tables.KINDS[kind](ROOT / record, *words)
    return f"{table.rstrip()}\n\n{page_tables.source(ROOT / record)}\n"


def missing(text: str) -> list[str]:
    """Records that a page shows and that do not exist."""
    named = [shlex.split(found[1])[:2] for found in BLOCK.findall(text)]
    return sorted({at for kind, at in named if kind != "planned" and not (ROOT / at).exists()})


def absent(text: str) -> list[str]:
    """Rows that a page asks for and that their records do not have."""
    marks = [shlex.split(found[1]) for found in BLOCK.findall(text)]
    rows = [words for words in marks if words[0] == "rows" and (ROOT / words[1]).exists()]
    return [
        f"row {name!r} in {path}"
        for _, path, *names in rows
        for name in page_tables.absent(ROOT / path, *names)
    ]


def main() -> None:
    """Render every page and every picture; say which records and rows are missing."""
    evidence.write(RESULTS)
    calls.write(RESULTS)
    gpu_fit.write(RESULTS, blueprint_of_shape(tiny=False))
    for page in PAGES:
        page.write_text(published(page.read_text()))
        for what in [*missing(page.read_text()), *absent(page.read_text())]:
            print(f"{page.relative_to(ROOT)}: there is no {what}")
    for name, draw in page_pictures.PICTURES.items():
        (ROOT / "docs/img" / name).write_text(draw())


if __name__ == "__main__":
    main()
