"""What calling a model costs beside its arithmetic: Python, in the time of small operations.

The ratio is measured with toys of a few layers through a real Context, whose arithmetic is next to
nothing.  `calls.json` keeps what a record measured, since plans do not import transformers.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import torch

FILE: Final = Path(__file__).with_name("calls.json")
RECORD: Final = "plan-cpu.json"
_FEW, _MORE = 2, 8
_STEPS, _ROUNDS = 12, 4
_TOY: Final[dict[str, Any]] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 4096,
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Calls:
    """Times of small operations of PyTorch (`Costs.op`).

    Attributes:
        layer: for a decoder layer under saccade, by C++ layers where they serve the model.
        model: around the layers: embedding, masks, rotary tables, the choice of a token.
    """

    layer: float
    model: float


def recorded() -> Calls:
    """What the record measured."""
    return Calls(**json.loads(FILE.read_text())["calls"])


def measured_calls() -> Calls:
    """Both, measured on this CPU in about a second; transformers is imported."""
    from transformers import LlamaConfig, LlamaForCausalLM

    toys = {
        layers: LlamaForCausalLM(LlamaConfig(**_TOY, num_hidden_layers=layers)).eval()
        for layers in (_FEW, _MORE)
    }
    ops: list[float] = []
    steps: dict[int, list[float]] = {layers: [] for layers in toys}
    for _ in range(_ROUNDS):  # in turns, so that all meet the same noise
        ops.append(_op_seconds())
        for layers, toy in toys.items():
            steps[layers].append(_step_seconds(toy))
    few, more, op = min(steps[_FEW]), min(steps[_MORE]), min(ops)
    layer = (more - few) / (_MORE - _FEW)
    return Calls(layer=max(0.0, layer) / op, model=max(0.0, few - _FEW * layer) / op)


def _op_seconds() -> float:
    x = torch.ones(1, 8)
    begin = time.perf_counter()
    with torch.inference_mode():
        for _ in range(400):
            torch.add(x, x)
    return (time.perf_counter() - begin) / 400


def _step_seconds(model: Any) -> float:
    """The fastest step of decoding behind a short prompt."""
    from saccade.hf.context import Context

    with Context(model) as ctx:
        moments = [time.perf_counter() for _ in ctx.stream([1] * 16, n_predict=_STEPS)]
    return min(b - a for a, b in pairwise(moments))


def write(results: Path) -> None:
    """Write the file from the record in a folder."""
    record = json.loads((results / RECORD).read_text())
    found = {"record": RECORD, "revision": record["revision"], "calls": record["calls"]}
    FILE.write_text(json.dumps(found, indent=1) + "\n")
