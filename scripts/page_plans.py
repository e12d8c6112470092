"""What `saccade.plan` says of well-known shapes of models, for docs/recipes.md: no measurement."""

from __future__ import annotations

from typing import Any, Final

import saccade
from saccade.report.markdown import table_text
from saccade.report.numbers import as_bytes
from saccade.report.table import Cell, Heading, Line, Table

_LLAMA: Final = {
    "model_type": "llama",
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128_256,
    "max_position_embeddings": 131_072,
    "dtype": "bfloat16",
}
SHAPES: dict[str, dict[str, Any]] = {
    "Llama-3.2-3B": {
        **_LLAMA,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "tie_word_embeddings": True,
    },
    "Llama-3.1-8B": {
        **_LLAMA,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
}
OPTIONS: dict[str, dict[str, Any]] = {
    "as it is, bf16": {},
    "int8": {"type_k": "int8", "type_v": "int8"},
    "int8 keys, int4 values": {"type_k": "int8", "type_v": "int4"},
    "int4": {"type_k": "int4", "type_v": "int4"},
    "window 4,096 + 4 sinks": {"n_swa": 4096, "n_sinks": 4},
}


def planned(shape: str, tokens: str) -> str:
    """Bytes of weights and caches for a shape and a length, under each option.

    Attention needs a few MiB more, another number on each machine: it depends on the threads.
    """
    lines: list[Line] = []
    for name, options in OPTIONS.items():
        plan = saccade.plan(SHAPES[shape], saccade.ContextParams(**options), int(tokens))
        assert plan.weights_bytes is not None
        sizes = (plan.weights_bytes, plan.cache_bytes)
        lines.append(Line(name, [Cell(as_bytes(size)) for size in (*sizes, sum(sizes))]))
    titles = ("weights, bf16", "caches", "together")
    corner = f"{shape}'s shape, {int(tokens):,} tokens"
    return table_text(Table([Heading(title) for title in titles], lines, corner)) + "\n"
