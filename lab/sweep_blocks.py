"""Try launch configurations of block-sparse attention on a card."""

import sys

sys.path.insert(0, ".")
from benchmarks.gpu_attention import blocks_case
from saccade.ops import tuning
from saccade.ops.tuning import Launch

for config in ((128, 64, 8, 3), (128, 128, 8, 2), (128, 64, 8, 4), (64, 64, 4, 4)):
    tuning.FORWARD_LISTED["sm_90"] = ((512, Launch(*config)),)
    try:
        print(config, round(blocks_case(32768, 0.25)["triton"]), flush=True)
    except Exception as error:
        print(config, type(error).__name__, str(error)[:80], flush=True)
