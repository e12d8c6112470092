"""Without Triton the tests can be collected, and those that need it are skipped in words."""

import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
# Collected where Triton is: they import it only to run, or not at all.
ALWAYS = {"test_api", "test_backends", "test_cpu", "test_dispatch", "test_support_matrix"}


def test_operators_are_collected_without_triton():
    command = [sys.executable, "-m", "tests.support.without_triton", "--collect-only", "-q", "-rs"]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider", str(HERE)],
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    skipped = re.findall(r"SKIPPED .*ops/(test_\w+)\.py.*: (.*)", done.stdout)
    assert skipped and all("triton" in reason.lower() for _, reason in skipped)
    needing = {path.stem for path in HERE.glob("test_*.py") if _needs_triton(path)}
    assert {name for name, _ in skipped} == needing
    assert not needing & ALWAYS


def _needs_triton(path):
    return bool(re.search(r"^pytest.importorskip\(\s*\"triton\"", path.read_text(), re.MULTILINE))
