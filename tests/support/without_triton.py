"""Run pytest as on a machine without Triton: `python -m tests.support.without_triton ARGUMENTS`."""

import sys
from typing import Any


class Hiding:
    """A finder of modules that finds no Triton."""

    def __init__(self, finder: Any) -> None:
        self.finder = finder

    def __getattr__(self, name: str) -> Any:
        return getattr(self.finder, name)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        hidden = name.partition(".")[0] == "triton"
        return None if hidden else self.finder.find_spec(name, path, target)


if __name__ == "__main__":
    sys.meta_path[:] = [Hiding(finder) for finder in sys.meta_path]
    import pytest

    sys.exit(pytest.main(sys.argv[1:]))
