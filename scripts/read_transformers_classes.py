"""Hash the classes of transformers that `saccade/hf/allowlist.json` names, and add what is new.

    python scripts/read_transformers_classes.py                  the installed version
    python scripts/read_transformers_classes.py /tmp/unpacked    a wheel that was unpacked there
    python scripts/read_transformers_classes.py --check          change nothing, fail if some differ

A name is added by hand, with an empty list, after reading the class and finding that it is
what `saccade/hf/allowlist.py` says of its kind.  Then this script adds the hash.  A hash that
changes with a new version means that the class has to be read again before it is added.
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from saccade.hf.allowlist import FILE, read_entries, source_hash


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root", nargs="?", type=Path, default=installed(), metavar="FOLDER")
    parser.add_argument("--check", action="store_true", help="change nothing")
    arguments = parser.parse_args()
    entries, new = read_entries(), []
    for kind, names in entries.items():
        for name, hashes in names.items():
            found = hash_of(arguments.root, name, kind)
            if found is not None and found not in hashes:
                new.append(name)
                hashes.append(found)
    print("\n".join(f"new: {name}" for name in new) or "nothing new")
    if new and not arguments.check:
        FILE.write_text(rendered(entries))
    return int(bool(new) and arguments.check)


def installed() -> Path:
    """The folder that holds the package transformers."""
    spec = find_spec("transformers")
    assert spec is not None and spec.origin is not None, "transformers is not installed"
    return Path(spec.origin).parents[1]


def hash_of(root: Path, name: str, kind: str) -> str | None:
    """Hash of a class or function by its qualified name; None where a version has none."""
    module, _, own = name.rpartition(".")
    path = root.joinpath(*module.split(".")).with_suffix(".py")
    if not path.is_file():
        return None
    wanted = (own, "rotate_half") if kind == "rotary_function" else (own,)
    sources = [sources_in(path).get(each) for each in wanted]
    return None if None in sources else source_hash(*map(str, sources))


@cache
def sources_in(path: Path) -> dict[str, str]:
    """Name -> source of top-level classes and functions, decorators included, as inspect says."""
    text = path.read_text()
    lines, found = text.splitlines(), {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            first = min([node.lineno, *(each.lineno for each in node.decorator_list)])
            found[node.name] = "\n".join(lines[first - 1 : node.end_lineno])
    return found


def rendered(entries: dict[str, dict[str, list[str]]]) -> str:
    """JSON with one line for each name."""
    parts = []
    for kind, names in entries.items():
        lines = [f'    "{name}": {json.dumps(hashes)}' for name, hashes in sorted(names.items())]
        parts.append(f'  "{kind}": {{\n' + ",\n".join(lines) + "\n  }")
    return "{\n" + ",\n".join(parts) + "\n}\n"


if __name__ == "__main__":
    sys.exit(main())
