"""Print the lowest versions that pyproject.toml allows, as requirements for pip.

    python scripts/floors.py          numpy==2.0.0 transformers==5.16.0 ...

torch is left out: its oldest release has no small wheel for CPUs (CONTRIBUTING.md).
"""

import re
import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"


def floors(text: str) -> dict[str, str]:
    """Name and lowest version, three numbers long, of every requirement with a floor."""
    project = tomllib.loads(text)["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["hf"]]
    found = (re.fullmatch(r"([\w-]+)>=([\d.]+)(?:,<\d+)?", requirement) for requirement in wanted)
    return {m[1]: ".".join([*m[2].split("."), "0", "0"][:3]) for m in found if m}


if __name__ == "__main__":
    lowest = floors(PYPROJECT.read_text())
    print(*(f"{name}=={version}" for name, version in lowest.items() if name != "torch"))
