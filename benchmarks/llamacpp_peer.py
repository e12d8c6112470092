"""llama.cpp measured through its Python binding; run by the interpreter that has the binding.

    llama/bin/python benchmarks/llamacpp_peer.py quantize in.gguf out.gguf Q4_K_M

Nothing of saccade is imported here: the environment holds llama-cpp-python alone.
"""

from __future__ import annotations

import argparse
import os

FTYPES = {"Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q4_K_S": 14, "Q4_K_M": 15,
          "Q5_K_S": 16, "Q5_K_M": 17, "Q6_K": 18, "Q2_K": 10, "Q3_K_M": 12, "BF16": 32}  # fmt: skip
"""Names of llama.cpp's kinds of files -> its numbers (llama.h, llama_ftype)."""


def quantize(source: str, target: str, kind: str) -> None:
    """Write a file of another kind."""
    import llama_cpp

    llama_cpp.llama_backend_init()
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = FTYPES[kind]
    options.nthread = os.cpu_count() or 1
    failed = llama_cpp.llama_model_quantize(source.encode(), target.encode(), options)
    if failed:
        raise SystemExit(f"llama.cpp could not make {target}: error {failed}.")


def main() -> None:
    """Run one job."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    jobs = parser.add_subparsers(dest="job", required=True)
    job = jobs.add_parser("quantize")
    job.add_argument("source")
    job.add_argument("target")
    job.add_argument("kind", choices=FTYPES)
    arguments = parser.parse_args()
    quantize(arguments.source, arguments.target, arguments.kind)


if __name__ == "__main__":
    main()
