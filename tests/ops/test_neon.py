"""scripts/neon.sh: the kernels of aarch64 in an emulator, or one line that says what is missing."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOLS = ("bash", "dirname", "uname")


@pytest.mark.skipif(os.uname().machine == "aarch64", reason="needs no cross-compiler there")
def test_a_missing_tool_is_named_in_one_line(tmp_path):
    for tool in TOOLS:
        (tmp_path / tool).symlink_to(str(shutil.which(tool)))
    found = []
    for tool in ("aarch64-linux-gnu-g++", "qemu-aarch64-static"):
        done = subprocess.run(
            [tmp_path / "bash", ROOT / "scripts/neon.sh"],
            env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=True,
        )  # fmt: skip
        found.append(done.stdout)
        (tmp_path / tool).symlink_to("/bin/true")
    assert [line.count("\n") for line in found] == [1, 1]
    assert "NEON was NOT tested: aarch64-linux-gnu-g++ is not installed" in found[0]
    assert "NEON was NOT tested: qemu-aarch64-static is not installed" in found[1]


def test_what_make_test_runs_includes_it():
    makefile = (ROOT / "Makefile").read_text()
    recipe = makefile.split("\ntest:\n")[1].split("\n\n")[0]
    assert re.search(r"\$\(MAKE\) .* ahead\n", recipe)
    assert re.search(r"^ahead: .*\bneon\b", makefile, re.MULTILINE)
    assert "qemu-user-static" in (ROOT / ".ci/run").read_text()
