"""A whole model against llama.cpp and transformers: loading, memory, prompt, tokens/s, KL.

    python -m benchmarks.whole_model model.gguf --peer-python llama/bin/python
    python -m benchmarks.whole_model model.gguf --contexts 16384 --rows "saccade" "llama.cpp" \\
        --seconds 500 --peer-python llama/bin/python
    python -m benchmarks.whole_model --quick

Every measurement is a process of its own, which loads the file, reads the same tokens and goes on
behind them several times.  Rounds go through all rows in turns.  A record that is there already is
continued, so that long runs can be made in pieces; the default is one for each family of
processors.  KL is that of predictions on the text of the help topics of Python, from those of
float32 weights of the same file.  llama.cpp is run by the interpreter of another environment, which
has llama-cpp-python.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from saccade.core.hardware import processor_family
from saccade.report.files import write_whole
from saccade.report.record import as_text, origin
from saccade.runtime.located import located

SCHEMA = "saccade.whole_model/1"
RESULTS = Path(__file__).parent / "results"
PEER = Path(__file__).with_name("llamacpp_peer.py")
ROWS: dict[str, dict[str, Any]] = {
    "saccade": {},
    "saccade, bf16 cache": {"type_k": "bf16", "type_v": "bf16"},
    "saccade, int8 cache": {"type_k": "int8", "type_v": "int8"},
    "saccade, int8 keys, int4 values": {"type_k": "int8", "type_v": "int4"},
    "saccade, int4 cache": {"type_k": "int4", "type_v": "int4"},
    "saccade, weights int8": {"weights": "int8"},
    "saccade, weights int4": {"weights": "int4"},
    "saccade, weights bf16": {"weights": "bf16"},
    "saccade, weights f32": {"weights": "f32"},
    "llama.cpp": {"flash_attn": 1},
    "llama.cpp, no flash attention": {"flash_attn": 0},
    "llama.cpp, q8_0 cache": {"flash_attn": 1, "cache": "q8_0"},
    "llama.cpp, q4_0 cache": {"flash_attn": 1, "cache": "q4_0"},
    "transformers sdpa, float32": {"dtype": "f32"},
    "transformers sdpa, bfloat16": {"dtype": "bf16"},
}
"""What is measured; the words in front of the first comma or blank name the engine."""
EXACT = "saccade, weights f32"
"""What KL is measured from."""
CONTEXTS = (512, 4096, 16384)
SCORED, KL_CONTEXT = 512, 1024
QUICK_ROWS = ("saccade", "llama.cpp")
KEPT = ("weights", "weights_bytes", "version", "failed")
"""What a row of KL keeps of what a process said."""


def engine_of(row: str) -> str:
    """`saccade`, `llama.cpp` or `transformers`."""
    return re.split("[, ]", row)[0]


def run(request: dict[str, Any], peer_python: str | None) -> dict[str, Any]:
    """One request in a process of its own -> what it says, or why it failed."""
    engine = request["engine"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "request.json"
        if engine == "llama.cpp":
            words = [str(peer_python), str(PEER), "measure", str(path)]
        else:
            words = [sys.executable, "-m", "benchmarks.whole_model_run", str(path)]
        threads = str(request["threads"])
        environment = os.environ | {"OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"}
        path.write_text(json.dumps(request | {"spawned": time.time()}))
        done = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0 and lines and lines[-1].startswith("{"):
        return json.loads(lines[-1])
    said = (done.stderr.strip().splitlines() or [""])[-1]
    return {"failed": f"exit code {done.returncode}: {said}"[:300]}


def job_of(row: str, model: Path, ids: list[int], threads: int) -> dict[str, Any]:
    """The request of a row but for what is done."""
    return {"engine": engine_of(row), "options": ROWS[row], "model": str(model), "ids": ids,
            "threads": threads}  # fmt: skip


def speed(row: str, model: Path, ids: list[int], arguments: argparse.Namespace) -> dict[str, Any]:
    """Loading, memory, prompt and tokens of one row behind one prompt."""
    request = job_of(row, model, ids, arguments.threads)
    job = "measure" if request["engine"] == "llama.cpp" else request["engine"]
    request |= {"job": job, "written": arguments.written, "runs": arguments.runs}
    return run(request, arguments.peer_python)


def divergences(
    rows: list[str], model: Path, ids: list[int], arguments: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """KL of each row's predictions from those of float32 weights, on the last SCORED tokens."""
    import numpy as np
    import torch

    from saccade.evals.quality import divergence

    scored = min(SCORED, len(ids) // 2)
    with tempfile.TemporaryDirectory() as folder:

        def predictions(row: str) -> dict[str, Any]:
            out = str(Path(folder) / "logits.npy")
            request = job_of(row, model, ids, arguments.threads)
            found = run(request | {"job": "logits", "scored": scored, "out": out},
                        arguments.peer_python)  # fmt: skip
            if "failed" not in found:
                found["predictions"] = torch.from_numpy(np.load(out)).log_softmax(-1)
            return found

        exact = predictions(EXACT)
        for row in rows:
            found = exact if "failed" in exact else predictions(row)
            facts = {"name": row, "model": model.stem, "tokens": len(ids), "scored": scored}
            facts |= {key: found[key] for key in KEPT if key in found}
            if "predictions" in found:
                each = divergence(found["predictions"], exact["predictions"])
                facts |= {"kl": each.kl, "kl_se": each.kl_se, "same_top": each.same_top}
            yield facts


def tokens_of(model: Path, count: int) -> list[int]:
    """The first tokens of the default text, as the file's own tokenizer cuts it."""
    from saccade.evals.text import default_text
    from saccade.hf.gguf.shards import read_gguf
    from saccade.hf.gguf_tokenizer import gguf_tokenizer

    tokenizer, _, _ = gguf_tokenizer(read_gguf(model).keys)
    ids: list[int] = tokenizer(default_text()[: 8 * count]).input_ids[:count]
    if len(ids) < count:
        raise SystemExit(f"the text has {len(ids):,} tokens: choose contexts up to that.")
    return ids


def default_record() -> Path:
    """The record of this family of processors."""
    return RESULTS / f"whole-model-{processor_family()}.json"


def record_of(path: Path, threads: int) -> dict[str, Any]:
    """A record to continue, or a new one.

    Raises:
        SystemExit: the file is another kind of record, or another machine's.
    """
    made = origin()
    made["environment"]["threads"] = threads
    new = {"schema": SCHEMA, **made, "peer": None, "models": {}, "rows": [], "kl": []}
    if not path.exists():
        return new
    old = json.loads(path.read_text())
    here = {name: made["environment"][name] for name in ("cpu", "cores", "threads")}
    there = {name: old.get("environment", {}).get(name) for name in here}
    if old.get("schema") != SCHEMA or here != there:
        raise SystemExit(
            f"{path.name} cannot be continued: it is {old.get('schema')} of {there}, expected "
            f"{SCHEMA} of {here}. Choose another --out."
        )
    return new | {name: old[name] for name in ("peer", "models", "rows", "kl")}


def shown(row: dict[str, Any]) -> str:
    """One line."""
    if "failed" in row:
        return f"  {row['name']:<32} failed: {row['failed']}"
    if "kl" in row:
        return f"  {row['name']:<32} KL {row['kl']:.2e} ±{row['kl_se']:.0e}"
    rate = sorted(row["decode_tps"])[len(row["decode_tps"]) // 2]
    return (
        f"  {row['name']:<32} load {row['load_s']:.1f} s, first token {row['first_token_s']:.2f} s,"
        f" then {rate:.1f} tokens/s, {row['ended'].get('resident', 0) / 1e9:.2f} GB resident"
    )


class Writer:
    """Keeps what was measured, on disk after each row."""

    def __init__(self, record: dict[str, Any], path: Path) -> None:
        self.record, self.path = record, path

    def add(self, kind: str, row: dict[str, Any]) -> None:
        """One row more."""
        peer = row.pop("version", None)
        self.record["peer"] = peer or self.record["peer"]
        made = {"date": self.record["date"], "revision": self.record["revision"]}
        self.record[kind].append(row | made)
        print(shown(row), flush=True)
        write_whole(self.path, as_text(json.loads(json.dumps(self.record))))

    def forget(self, model: str, context: int, rows: list[str]) -> None:
        """Leave out what was measured of these rows before."""
        old = {(name, model, context) for name in rows}
        kept = [row for row in self.record["rows"]
                if (row["name"], row["model"], row["context"]) not in old]  # fmt: skip
        self.record["rows"] = kept

    def next_round(self, model: str, context: int) -> int:
        """The first number that no row of this model and context has."""
        taken = [row["round"] for row in self.record["rows"]
                 if (row["model"], row["context"]) == (model, context)]  # fmt: skip
        return max(taken, default=-1) + 1


def measure(rows: list[str], arguments: argparse.Namespace, writer: Writer) -> None:
    """All models at all contexts, in rounds; then KL."""
    deadline = time.perf_counter() + arguments.seconds
    for model in map(located, arguments.models):
        writer.record["models"][model.stem] = {"bytes": model.stat().st_size}
        ids = tokens_of(model, max(*arguments.contexts, KL_CONTEXT))
        for context in arguments.contexts:
            if arguments.again:
                writer.forget(model.stem, context, rows)
            first = writer.next_round(model.stem, context)
            for turn in range(first, first + arguments.rounds):
                print(f"{model.stem}, {context:,} tokens, round {turn + 1}", flush=True)
                for row in rows:
                    if time.perf_counter() > deadline:
                        return
                    facts = {"name": row, "model": model.stem, "context": context, "round": turn}
                    writer.add("rows", facts | speed(row, model, ids[:context], arguments))
    for model in map(located, arguments.kl):
        known = {row["name"] for row in writer.record["kl"] if row["model"] == model.stem}
        left = [row for row in rows if row != EXACT and engine_of(row) != "transformers"]
        left = [row for row in left if row not in known or arguments.again]
        if not left or time.perf_counter() > deadline:
            continue
        print(f"KL on {model.stem}", flush=True)
        again = {(row, model.stem) for row in left}
        kept = [r for r in writer.record["kl"] if (r["name"], r["model"]) not in again]
        writer.record["kl"] = kept
        for row in divergences(left, model, tokens_of(model, KL_CONTEXT), arguments):
            writer.add("kl", row)


def chosen_rows(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> list[str]:
    """Rows that were asked for, by name or its beginning; all that can run here by default."""
    wanted = arguments.rows or (QUICK_ROWS if arguments.quick else ROWS)
    unknown = [name for name in wanted if name not in ROWS]
    if unknown:
        parser.error(f"no row is called {unknown[0]!r}: expected some of {'; '.join(ROWS)}.")
    peers = [name for name in wanted if engine_of(name) == "llama.cpp"]
    if peers and arguments.peer_python is None:
        if arguments.rows:
            parser.error(f"{peers[0]!r} needs --peer-python, an interpreter with llama-cpp-python.")
        print("llama.cpp is left out: --peer-python was not given.", file=sys.stderr)
        return [name for name in wanted if name not in peers]
    return list(wanted)


def main() -> None:
    """Measure and write one record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=["smollm2"], help="GGUF files, or smollm2")
    parser.add_argument("--contexts", nargs="+", type=int, default=list(CONTEXTS))
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="; ".join(ROWS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--written", type=int, default=16, help="tokens of a run of decoding")
    parser.add_argument("--runs", type=int, default=3, help="of decoding behind one prompt")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--kl", nargs="*", default=["smollm2"], help="models whose KL is measured")
    parser.add_argument("--again", action="store_true", help="in place of what is in the record")
    parser.add_argument("--peer-python", help="the interpreter that has llama-cpp-python")
    parser.add_argument("--quick", action="store_true", help="two rows, one round, 512 tokens")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin nothing after that time")
    parser.add_argument("--out", type=Path, help="default: the record of this processor")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.contexts, arguments.rounds, arguments.written = [512], 1, 8
    rows = chosen_rows(parser, arguments)
    path = arguments.out or default_record()
    measure(rows, arguments, Writer(record_of(path, arguments.threads), path))


if __name__ == "__main__":
    main()
