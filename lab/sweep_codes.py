"""Decoding over codes, B 1 and 128k keys: microseconds of each configuration of the kernel.

python lab/sweep_codes.py
"""

from benchmarks.gpu_attention import decode_case
from saccade.ops import tuning
from saccade.ops.tuning import Launch

CONFIGURATIONS = [
    Launch(16, 64, 4, 3, per_sm=3),
    Launch(16, 64, 4, 2, per_sm=4, registers=128),
    Launch(16, 64, 2, 3, per_sm=4),
    Launch(16, 64, 2, 2, per_sm=5, registers=200),
    Launch(16, 64, 1, 2, per_sm=6),
]


def main() -> None:
    """One line a configuration and kind; the best of int8 is the last line."""
    times = {}
    for kind, launches in (("int8", CONFIGURATIONS), ("int4", CONFIGURATIONS[::2])):
        for launch in launches:
            tuning.DECODE_CODES["sm_90"] = ((512, launch),)
            try:
                row = decode_case(1, 131072, kind)
                times[kind, launch] = row["us"]
                print(kind, launch, round(row["us"], 1), "us, error", row["error"], flush=True)
            except Exception as error:
                print(kind, launch, type(error).__name__, str(error)[:200], flush=True)
    print(min(times, key=lambda found: times[found] if found[0] == "int8" else 1e9)[1])


if __name__ == "__main__":
    main()
