"""pyright reads every file of the package but those that hold kernels."""

import re
import tomllib

from tests.architecture.source import ROOT, modules

KERNEL = re.compile(r"^@(triton|gluon)\.jit", re.MULTILINE)


def test_only_kernels_are_not_type_checked():
    kernels = {
        path.relative_to(ROOT).as_posix()
        for path in modules().values()
        if KERNEL.search(path.read_text())
    }
    pyright = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pyright"]
    lines = "\n".join(f'    "{path}",' for path in sorted(kernels))
    assert pyright["include"] == ["saccade"]
    assert set(pyright["exclude"]) == kernels, f"tool.pyright.exclude has to be\n{lines}"
