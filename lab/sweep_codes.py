"""Decoding over codes, B 1 and 128k keys: microseconds of each configuration of the kernel.

python lab/sweep_codes.py
"""

from benchmarks.gpu_attention import decode_case
from saccade.ops import tuning
from saccade.ops.tuning import Launch

CONFIGURATIONS = [
    Launch(16, 64, 4, 1, per_sm=2),
    Launch(16, 64, 4, 1, per_sm=3, registers=168),
    Launch(16, 64, 2, 1, per_sm=4),
    Launch(16, 64, 2, 1, per_sm=6, registers=168),
    Launch(16, 32, 2, 1, per_sm=6),
]


def main() -> None:
    """One line a configuration and kind."""
    for kind, launches in (("int8", CONFIGURATIONS), ("int4", CONFIGURATIONS[:3:2])):
        for launch in launches:
            tuning.DECODE_CODES["sm_90"] = ((512, launch),)
            try:
                row = decode_case(1, 131072, kind)
                print(kind, launch, round(row["us"], 1), "us, error", row["error"], flush=True)
            except Exception as error:
                print(kind, launch, type(error).__name__, str(error)[:200], flush=True)
    print("dense", decode_case(1, 131072)["us"], flush=True)


if __name__ == "__main__":
    main()
