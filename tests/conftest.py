"""Run with TRITON_INTERPRET=1, Triton's kernels are interpreted on the CPU and tested there."""

import os

if os.environ.get("TRITON_INTERPRET") == "1":
    from tests.ops.interpreted import mend

    mend()
