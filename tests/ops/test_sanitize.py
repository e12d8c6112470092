"""scripts/sanitize_gpu.sh: its message without compute-sanitizer, and its groups."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts/sanitize_gpu.sh"


INSTALLED = shutil.which("compute-sanitizer", path=os.environ["PATH"] + ":/usr/local/cuda/bin")


@pytest.mark.skipif(INSTALLED is not None, reason="would run every kernel")
def test_without_the_tool_it_says_so():
    done = subprocess.run(["/bin/sh", SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "compute-sanitizer is not installed (CUDA toolkit).\n"


def test_its_groups_exist():
    kernels = (ROOT / "scripts/sanitize_kernels.py").read_text()
    (listed,) = re.findall(r"groups=\$\{\*:-([^}]+)\}", SCRIPT.read_text())
    assert (
        re.findall(r'^    "(\w+)": ', kernels, re.MULTILINE) == listed.replace("\\\n", "").split()
    )
