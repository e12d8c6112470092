"""llama.cpp through its Python binding: run by the interpreter of the environment that has it.

    llama/bin/python benchmarks/llamacpp_peer.py quantize in.gguf out.gguf Q4_K_M
    llama/bin/python benchmarks/llamacpp_peer.py measure request.json

Nothing of saccade is imported here, since that environment holds llama-cpp-python alone;
`benchmarks.whole_model_run` takes from here how memory is read and what a result looks like.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

FTYPES = {"Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q4_K_S": 14, "Q4_K_M": 15,
          "Q5_K_S": 16, "Q5_K_M": 17, "Q6_K": 18, "Q2_K": 10, "Q3_K_M": 12, "BF16": 32}  # fmt: skip
"""Names of llama.cpp's kinds of files -> its numbers (llama.h, llama_ftype)."""
TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 8, "bf16": 30}
"""Storage of a cache -> ggml_type."""
FIELDS = {"VmRSS": "resident", "RssAnon": "own", "RssFile": "mapped", "VmHWM": "peak"}


def memory() -> dict[str, int]:
    """Bytes of this process: resident, of them its own and mapped files, and the peak so far."""
    try:
        lines = [line.split() for line in Path("/proc/self/status").read_text().splitlines()]
    except OSError:  # a system without /proc knows the peak only
        scale = 1 if sys.platform == "darwin" else 1024
        return {"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale}
    return {FIELDS[words[0][:-1]]: int(words[1]) * 1024 for words in lines
            if words and words[0][:-1] in FIELDS}  # fmt: skip


def forget_peak() -> None:
    """Let the peak begin again at what is resident now, where the system can."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


class Clock:
    """Wall and processor seconds since it was made."""

    def __init__(self) -> None:
        self.began, self.cpu = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, float]:
        """Both, under the names that a result has for loading."""
        return {"load_s": time.perf_counter() - self.began,
                "load_cpu_s": time.process_time() - self.cpu}  # fmt: skip


def rates(moments: list[float], runs: int) -> list[float]:
    """Tokens a second of `runs` equal runs of steps; `moments` when each token was there."""
    size = (len(moments) - 1) // runs
    parts = (moments[i * size : (i + 1) * size + 1] for i in range(runs))
    return [size / (part[-1] - part[0]) for part in parts]


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


class Peer:
    """A loaded model with a context."""

    def __init__(self, request: dict[str, Any], n_ctx: int) -> None:
        import llama_cpp

        self.api: Any = llama_cpp
        options = request["options"]
        model_params = self.api.llama_model_default_params()
        model_params.n_gpu_layers = 0
        self.model = self.api.llama_model_load_from_file(request["model"].encode(), model_params)
        if not self.model:
            raise RuntimeError("llama.cpp could not load the file")
        params = self.api.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = n_ctx, 2048, 512
        params.n_threads = params.n_threads_batch = request["threads"]
        params.type_k = params.type_v = TYPES[options.get("cache", "f16")]
        params.flash_attn_type = options.get("flash_attn", -1)
        self.context = self.api.llama_init_from_model(self.model, params)
        if not self.context:
            raise RuntimeError("llama.cpp could not make a context under these options")
        self.vocabulary = self.api.llama_vocab_n_tokens(self.api.llama_model_get_vocab(self.model))

    def read(self, ids: list[int]) -> int:
        """Read tokens -> the most likely next one."""
        import numpy as np

        for begin in range(0, len(ids), 2048):
            part = ids[begin : begin + 2048]
            tokens = (ctypes.c_int32 * len(part))(*part)
            failed = self.api.llama_decode(
                self.context, self.api.llama_batch_get_one(tokens, len(part))
            )
            if failed:
                raise RuntimeError(f"llama_decode failed: {failed}")
        last = self.api.llama_get_logits_ith(self.context, -1)
        return int(np.ctypeslib.as_array(last, (self.vocabulary,)).argmax())

    def all_logits(self, ids: list[int]) -> Any:
        """Read tokens, at most 512 -> float32 [tokens, vocabulary]."""
        import numpy as np

        batch = self.api.llama_batch_init(len(ids), 0, 1)
        begin = self.seen
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, begin + i, 1
            batch.seq_id[i][0], batch.logits[i] = 0, 1
        batch.n_tokens = len(ids)
        if self.api.llama_decode(self.context, batch):
            raise RuntimeError("llama_decode failed")
        found = self.api.llama_get_logits(self.context)
        return np.ctypeslib.as_array(found, (len(ids), self.vocabulary)).copy()

    @property
    def seen(self) -> int:
        """Tokens in the cache."""
        cells = self.api.llama_get_memory(self.context)
        return self.api.llama_memory_seq_pos_max(cells, 0) + 1

    def forget(self) -> None:
        """Empty the cache."""
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)


def loaded(request: dict[str, Any], n_ctx: int) -> tuple[Peer, dict[str, Any]]:
    """A peer that has run once, and what loading it took."""
    import llama_cpp

    silent = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    found: dict[str, Any] = {"before": memory()}
    forget_peak()
    clock = Clock()
    peer = Peer(request, n_ctx)
    peer.keep = silent  # type: ignore[attr-defined]
    found |= clock.read() | {"ready_s": time.time() - request["spawned"], "loaded": memory()}
    return peer, found


def measure(request: dict[str, Any]) -> dict[str, Any]:
    """Load, read the prompt, and write `runs` runs of `written` tokens behind it."""
    ids, steps = request["ids"], request["written"] * request["runs"]
    peer, found = loaded(request, -(-(len(ids) + steps + 8) // 256) * 256)
    token = peer.read(ids[:16])
    peer.read([token])
    peer.forget()
    forget_peak()
    begin = time.perf_counter()
    token = peer.read(ids)
    moments = [time.perf_counter()]
    found |= {"first_token_s": moments[0] - begin}
    for _ in range(steps):
        token = peer.read([token])
        moments.append(time.perf_counter())
    cells = peer.api.llama_state_seq_get_size(peer.context, 0)
    return found | {
        "decode_tps": rates(moments, request["runs"]),
        "cache_bytes": cells,
        "ended": memory(),
        "version": version(),
    }


def version() -> str:
    """Of the binding, and what llama.cpp was built for."""
    import llama_cpp

    built = llama_cpp.llama_print_system_info().decode().split("|")
    names = [part.split("=")[0].split(":")[-1].strip() for part in built if "= 1" in part]
    return f"llama-cpp-python {llama_cpp.__version__} ({', '.join(names)})"


def logits(request: dict[str, Any]) -> dict[str, Any]:
    """The last `scored` logits of a text, written to the file `out`."""
    import numpy as np

    ids, scored = request["ids"], request["scored"]
    peer, found = loaded(request, -(-(len(ids) + 8) // 256) * 256)
    peer.read(ids[:-scored])
    parts = [peer.all_logits(ids[-scored:][at : at + 512]) for at in range(0, scored, 512)]
    np.save(request["out"], np.concatenate(parts))
    return found | {"version": version()}


def answer(request: dict[str, Any], jobs: dict[str, Callable[[dict[str, Any]], Any]]) -> None:
    """Print what a job gives as the last line of stdout, or why it failed."""
    try:
        found = jobs[request["job"]](request)
    except Exception as error:  # any library may fail in any way; the other rows go on
        found = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]}
    print("\n" + json.dumps(found), flush=True)


def main() -> None:
    """Run one job."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    kinds = parser.add_subparsers(dest="job", required=True)
    job = kinds.add_parser("quantize")
    job.add_argument("source")
    job.add_argument("target")
    job.add_argument("kind", choices=FTYPES)
    job = kinds.add_parser("measure")
    job.add_argument("request", type=Path, help="JSON that benchmarks.whole_model wrote")
    arguments = parser.parse_args()
    if arguments.job == "quantize":
        quantize(arguments.source, arguments.target, arguments.kind)
    else:
        request = json.loads(arguments.request.read_text())
        answer(request, {"measure": measure, "logits": logits})


if __name__ == "__main__":
    main()
