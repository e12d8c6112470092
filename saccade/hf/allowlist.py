"""Which classes of transformers may be replaced by fused kernels: those whose source was read.

`allowlist.json` names them by kind, each with the sha256 of the source it had when it was read, one
for each version of transformers in which it differs.  A class that is not listed, whose source is
another one, or whose `forward` was patched, runs as it is.  `scripts/read_transformers_classes.py`
adds the hashes of another version.

    rms_norm            weight * x / rms(x)
    rms_norm_plus_one   (1 + weight) * x / rms(x), Gemma's
    gated_mlp           down_proj(act_fn(gate_proj(x)) * up_proj(x))
    dropout_mlp         the same, with dropout in training
    joined_mlp          the same with activation_fn, and gate and up the halves of gate_up_proj(x)
    decoder_layer       h = x + self_attn(input_layernorm(x)); h + mlp(post_attention_layernorm(h));
                        Phi 3's with dropout in training
    multiplied_layer    the same, what is added times residual_multiplier
    sandwich_layer      the same with norms of what is added: Gemma 2's four norms
    postnorm_layer      with norms of what is added alone, the last two of those
    decoder             norm(layers(embed_tokens(ids))): causal, windows and rotary tables by layer;
                        embeddings times embedding_multiplier where it has one
    causal_lm           lm_head(decoder), softcapped where config.final_logit_softcapping says so,
                        divided by config.logits_scaling where there is one
    attention           its forward calls the global `apply_rotary_pos_emb` on queries and keys
    rotary_function     RoPE by halves: (a, b) -> (a cos - b sin, b cos + a sin)
"""

from __future__ import annotations

import hashlib
import inspect
import json
import textwrap
from functools import cache
from pathlib import Path
from typing import Any, Final

from transformers import modeling_layers

FILE: Final = Path(__file__).with_name("allowlist.json")
KINDS: Final = (
    "rms_norm",
    "rms_norm_plus_one",
    "gated_mlp",
    "dropout_mlp",
    "joined_mlp",
    "decoder_layer",
    "multiplied_layer",
    "sandwich_layer",
    "postnorm_layer",
    "decoder",
    "causal_lm",
    "attention",
    "rotary_function",
)

_DECORATED: Final = ("decoder", "causal_lm")
_PACKAGE: Final = str(Path(modeling_layers.__file__).parent)


def kind_of(module_class: type) -> str | None:
    """The kind of a class whose source is listed and whose `forward` is still that of its source.

    None for every other class.
    """
    listed = _entries().get(_qualified(module_class))
    if listed is None or listed[0] == "rotary_function":
        return None
    return _checked(module_class, vars(module_class).get("forward"))


def is_rotary_function(function: Any) -> bool:
    """Whether a function is a listed `apply_rotary_pos_emb` that rotates by halves."""
    kind, hashes = _entries().get(_qualified(function), (None, ()))
    rotate_half = getattr(function, "__globals__", {}).get("rotate_half")
    if kind != "rotary_function" or rotate_half is None:
        return False
    sources = [_source(function), _source(rotate_half)]
    return None not in sources and source_hash(*map(str, sources)) in hashes


def source_hash(*sources: str) -> str:
    """sha256 of source texts, without the indentation of the first line and trailing spaces."""
    lines = "\n".join(textwrap.dedent(source).strip() for source in sources).splitlines()
    return hashlib.sha256("\n".join(line.rstrip() for line in lines).encode()).hexdigest()


def read_entries() -> dict[str, dict[str, list[str]]]:
    """The file: kind -> qualified name -> hashes."""
    return json.loads(FILE.read_text())


@cache
def _entries() -> dict[str, tuple[str, tuple[str, ...]]]:
    """Qualified name -> (kind, hashes)."""
    return {
        name: (kind, tuple(hashes))
        for kind, names in read_entries().items()
        for name, hashes in names.items()
    }


@cache
def _checked(module_class: type, forward: Any) -> str | None:
    """The kind of a class with this `forward`, if both are what was read."""
    kind, hashes = _entries()[_qualified(module_class)]
    bare = _without_decorators if kind in _DECORATED else _without_checkpointing
    source, of_forward = _source(module_class), _source(bare(forward))
    if source is None or of_forward is None or source_hash(source) not in hashes:
        return None
    return kind if of_forward in source else None


def _without_checkpointing(forward: Any) -> Any:
    """`forward` without the wrapper that transformers puts around every decoder layer's.

    It calls what it wraps, except in training with gradient checkpointing.
    """
    name, file = _origin(forward)
    wraps = name.startswith("GradientCheckpointingLayer.__init_subclass__.")
    return forward.__wrapped__ if wraps and file == modeling_layers.__file__ else forward


def _without_decorators(forward: Any) -> Any:
    """`forward` without transformers' own decorators, which its source names."""
    while hasattr(forward, "__wrapped__") and _origin(forward)[1].startswith(_PACKAGE):
        forward = forward.__wrapped__
    return forward


def _origin(function: Any) -> tuple[str, str]:
    """Qualified name and file of the code of a function."""
    code: Any = getattr(function, "__code__", None)
    return getattr(code, "co_qualname", ""), getattr(code, "co_filename", "")


def _qualified(thing: Any) -> str:
    return f"{getattr(thing, '__module__', '')}.{getattr(thing, '__qualname__', '')}"


def _source(thing: Any) -> str | None:
    """Source text, None for what has none; a wrapped function is not what its source says."""
    if hasattr(thing, "__wrapped__"):
        return None
    try:
        return inspect.getsource(thing)
    except (OSError, TypeError):
        return None
