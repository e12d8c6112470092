"""Put a record of `make demo` where the README shows it: the record, its table, its picture.

python scripts/publish_record.py out/compare.json
"""

import re
import sys
from pathlib import Path

from saccade.report.figures import to_png
from saccade.report.markdown import to_markdown
from saccade.report.record import read

ROOT = Path(__file__).parents[1]
RECORD = "benchmarks/results/compare-smollm2-quick.json"


def main(source: str) -> None:
    """Copy the record, draw the picture, and replace the table between its marks."""
    report = read(Path(source))
    report.write(ROOT / RECORD)
    (ROOT / "docs/img/compare.png").write_bytes(to_png(report))
    readme = ROOT / "README.md"
    marks = rf"(<!-- table: {RECORD} -->\n).*?(<!-- end of table -->)"
    table = to_markdown(report)
    text = re.sub(marks, lambda m: m[1] + table + m[2], readme.read_text(), flags=re.DOTALL)
    readme.write_text(text)


if __name__ == "__main__":
    main(sys.argv[1])
