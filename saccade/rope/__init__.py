"""Rotary position embeddings: frequencies, tables of cos and sin, rotation, shifting of keys.

rule, base, partial = parse(config.rope_parameters, max_position_embeddings=131072)
inv_freq, magnitude = inverse_frequencies(rule, base=base, rotary_dim=128)
cos, sin = tables(inv_freq, torch.arange(4096), magnitude)
q, k = apply(q, cos, sin), apply(k, cos, sin)
k = shift_keys(k, inv_freq, -1024)  # the same keys, 1024 positions earlier
"""

from saccade.rope.frequencies import Frequencies, inverse_frequencies
from saccade.rope.rotary import apply, tables
from saccade.rope.rules import (
    DynamicNTK,
    Linear,
    Llama3,
    LongRoPE,
    NTKAware,
    ParsedRope,
    Rule,
    Unscaled,
    YaRN,
    parse,
)
from saccade.rope.shift import shift_keys

__all__ = [
    "DynamicNTK",
    "Frequencies",
    "Linear",
    "Llama3",
    "LongRoPE",
    "NTKAware",
    "ParsedRope",
    "Rule",
    "Unscaled",
    "YaRN",
    "apply",
    "inverse_frequencies",
    "parse",
    "shift_keys",
    "tables",
]
