"""Render stored records where README and docs show them, between `<!-- table: RECORD -->` marks.

python -m scripts.publish_record                   # every page that has such marks
python -m scripts.publish_record out/compare.json  # first put a record of `make demo` in its place
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import caches, gpu_models, gpu_run, gpu_tables
from saccade.bench import record as bench
from saccade.bench import table as bench_table
from saccade.report import comparison
from saccade.report.figures import to_png
from saccade.report.markdown import to_markdown

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
DEMO = ROOT / "benchmarks/results/compare-smollm2-quick.json"
MARKS = re.compile(r"(<!-- table: (\S+) ?(\S*) -->\n)(.*?)(<!-- end of table -->)", re.DOTALL)

# How a record of a schema is shown: its path, its content and the part of it that is shown.
RENDER: dict[str, Callable[[Path, dict[str, Any], str], str]] = {
    comparison.SCHEMA: lambda path, data, part: to_markdown(
        comparison.read(path), part or "comparison"
    ),
    bench.SCHEMA: lambda path, data, part: bench_table.to_markdown(bench.read(path)),
    caches.SCHEMA: lambda path, data, part: caches.to_markdown(data),
    caches.KILLS_SCHEMA: lambda path, data, part: caches.kills_in_words(data),
    gpu_run.SCHEMA: lambda path, data, part: gpu_tables.to_markdown(data, part),
    gpu_models.SCHEMA: lambda path, data, part: gpu_tables.model_to_markdown(data),
}


def published(text: str) -> str:
    """A page with what stands between its marks rendered again."""
    return MARKS.sub(lambda m: m[1] + _rendered(ROOT / m[2], m[3], m[4]) + m[5], text)


def _rendered(path: Path, part: str, before: str) -> str:
    """The record as text; records from before schemas were written stay as they are."""
    data = json.loads(path.read_text())
    return RENDER[data["schema"]](path, data, part) if "schema" in data else before


def main() -> None:
    """Render every page; a record given as an argument becomes the README's."""
    if len(sys.argv) > 1:
        report = comparison.read(Path(sys.argv[1]))
        report.write(DEMO)
        (ROOT / "docs/img/compare.png").write_bytes(to_png(report))
    for page in PAGES:
        page.write_text(published(page.read_text()))


if __name__ == "__main__":
    main()
