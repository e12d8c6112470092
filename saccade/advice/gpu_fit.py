"""The numbers of `gpu_shares.json`, worked out of two records of Llama-3.1-8B's shape.

Fitted are the prompts of 4,096 and 130,816 tokens and the steps behind 4,096 of one record, and the
settings at 8,192 tokens of the other.  All other lengths are left out, so that they are a test.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final

from saccade.advice.gpu_speed import FILE, Roofline, Shares, gpu_speed, step_seconds
from saccade.runtime.params import ContextParams
from saccade.runtime.plan_blueprint import Blueprint

RECORDS: Final = ("h200_llama.json", "plan-h200.json")
FITTED: Final = 8192
"""The length of the second record that is fitted."""
_SHORT, _LONG = PROMPTS = (4096, 130816)
_CHUNK: Final = 8192
_NOTHING: Final = Shares(
    products=0, attention=0, step=0, quantized_step=0, host_layer=0, quantizing=0, observing=0
)


def fitted(results: Path, blueprint: Blueprint) -> dict[str, Any]:
    """What the file has to hold.

    Args:
        results: folder of the records; blueprint: of the model that they measured.
    """
    llama, plan = (json.loads((results / name).read_text()) for name in RECORDS)
    ceilings = llama["ceilings"]
    roof = Roofline(
        device=llama["environment"]["gpu"][0], flops=ceilings["matmul_tflops"] * 1e12,
        read=ceilings["read_gbs"] * 1e9, source=f"the record benchmarks/results/{RECORDS[0]}",
    )  # fmt: skip
    shares = _of_prompts(blueprint, roof, llama["ours"]["decode"])
    shares = _of_settings(blueprint, roof, shares, llama["ours"]["decode"], plan["rows"])
    revisions = {name: each["revision"] for name, each in zip(RECORDS, (llama, plan), strict=True)}
    return {"records": revisions, "roofline": asdict(roof), "shares": asdict(shares)}


def _of_prompts(blueprint: Blueprint, roof: Roofline, decode: Any) -> Shares:
    """The two multiples from a short and a long prompt: two equations, linear in them."""
    params = ContextParams(n_batch=_CHUNK)
    rows: list[tuple[float, float, float]] = []
    for tokens in (_SHORT, _LONG):
        none, products, attention = (
            gpu_speed(blueprint, params, tokens, roof, each).first_token
            for each in (_NOTHING, replace(_NOTHING, products=1), replace(_NOTHING, attention=1))
        )
        measured = decode[str(tokens)]["first_token_s"]
        rows.append((products - none, attention - none, measured - none))
    (a, b, x), (c, d, y) = rows
    determinant = a * d - b * c
    products, attention = (x * d - b * y) / determinant, (a * y - c * x) / determinant
    return replace(_NOTHING, products=products, attention=attention)


def _of_settings(
    blueprint: Blueprint, roof: Roofline, shares: Shares, decode: Any, rows: Any
) -> Shares:
    facts = blueprint.facts
    layers, width = facts.num_layers, facts.num_kv_heads * 2 * facts.head_dim
    at = {each["name"]: each["measured"] for each in rows if each["tokens"] == FITTED}
    dense, int8, snapkv = (at[name] for name in ("dense", "int8", "SnapKV 25 %"))

    def beyond(seconds: float, tokens: int, **options: Any) -> float:
        params = ContextParams(n_batch=_CHUNK, **options)
        return (seconds - step_seconds(blueprint, params, tokens, roof, _NOTHING)) / layers

    each_layer = FITTED * layers
    return replace(
        shares,
        step=beyond(1 / decode[str(_SHORT)]["tokens_per_s"], _SHORT),
        quantized_step=beyond(1 / int8["tokens_per_second"], FITTED, type_k="int8", type_v="int8"),
        host_layer=1 / snapkv["tokens_per_second"] / layers,
        quantizing=(int8["first_token"] - dense["first_token"]) / (each_layer * width),
        observing=(snapkv["first_token"] - dense["first_token"]) / (each_layer * facts.num_heads),
    )


def write(results: Path, blueprint: Blueprint) -> None:
    """Write the file from the records in a folder."""
    FILE.write_text(json.dumps(fitted(results, blueprint), indent=1) + "\n")
