"""The claims of docs/cpu.md: its commands parse, its table is a stored record."""

import re
import shlex
from pathlib import Path

from saccade.bench.record import read
from saccade.bench.table import to_markdown
from saccade.cli.main import parse

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs/cpu.md").read_text()


def test_commands_parse():
    lines = re.findall(r"saccade (bench cpu [^|`#\n]*)", TEXT)
    assert len(lines) >= 5
    for line in lines:
        assert parse(shlex.split(line)).info_name == "saccade bench cpu"


def test_the_table_is_the_stored_record():
    marked = re.search(r"<!-- table: (\S+) -->\n(.*?)<!-- end of table -->", TEXT, re.DOTALL)
    path, table = marked.groups()
    assert table.strip() == to_markdown(read(ROOT / path)).strip()
