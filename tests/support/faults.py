"""Wrong arguments of the operator's doors, one fault at a time."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

Given = dict[str, Any]
"""q, k, v and the options of `make_call`."""

NOT_TENSORS = (None, [1.0], 2.0, "q", torch.float32)
DTYPES = (torch.int64, torch.bool, torch.complex64, torch.float8_e5m2, torch.uint8)
WRONG_OPTIONS: dict[str, tuple[Any, ...]] = {
    "causal": ("no", 1, None, 0.0),
    "window": (0, -3, 4.0, True, "4", math.nan, torch.tensor([3])),
    "sinks": (-1, 2.5, True, "1", None),
    "scale": (math.nan, math.inf, -math.inf, "1", True, 1j, [1.0], 10**400, torch.ones(2)),
    "softcap": (0.0, -2, math.nan, math.inf, "9", True, 10**400),
    "q_offset": (1.5, "0", True, 2**40, -(2**40), 10**400, torch.tensor(3)),
    "sink_logits": ([0.0], 1.0, torch.zeros(7), torch.zeros(2, 2)),
    "alibi_slopes": ([0.0], 1.0, torch.zeros(7), torch.zeros(2, 2, 2)),
    "key_padding": ([True], torch.ones(3), torch.ones(7, 7) > 0, torch.ones(1) > 0),
    "kv_lens": ([3], 3, torch.ones(7, dtype=torch.int64), torch.ones(2)),
    "attn_mask": ([True], torch.ones(2, 2) > 0, torch.ones(7, 1, 1, 1) > 0, torch.zeros(1, 1)),
    "cu_seqlens": ([0], 3, torch.zeros(2), torch.tensor([0, 10**6]), (torch.tensor([0]),)),
    "blocks": (torch.ones(1, 1, 1, 1) > 0, True, "all"),
}  # fmt: skip


def _sparse(x: Tensor) -> Tensor:
    return x.contiguous().to_sparse()


def _taller(x: Tensor, axis: int) -> Tensor:
    return torch.cat((x, x.narrow(axis, 0, 1)), axis) if x.shape[axis] else x


TENSOR_FAULTS = {
    "batch": lambda x: _taller(x, 0),
    "dim": lambda x: _taller(x, 3),
    "rank": lambda x: x.flatten(0, 1),
    "more_rank": lambda x: x[None],
    "no_channels": lambda x: x[..., :0],
    "no_heads": lambda x: x[:, :0],
    "sparse": _sparse,
    "meta": lambda x: x.to("meta"),
}


def spoil_tensor(given: Given, name: str, fault: str, pick: int) -> bool:
    """Put a fault into q, k or v; whether the call must now be refused."""
    x = given[name]
    if fault == "not_a_tensor":
        given[name] = NOT_TENSORS[pick % len(NOT_TENSORS)]
    elif fault == "dtype":
        given[name] = x.to(DTYPES[pick % len(DTYPES)])
    else:
        given[name] = TENSOR_FAULTS[fault](x)
    unchanged = isinstance(given[name], Tensor) and given[name].shape == x.shape
    allowed = fault == "dim" and name == "v"  # another value_dim is right
    return not allowed and not (unchanged and fault in ("batch", "dim", "no_channels", "no_heads"))


def spoil_option(given: Given, name: str, pick: int) -> None:
    """Replace an option by one of the wrong values."""
    values = WRONG_OPTIONS[name]
    given[name] = values[pick % len(values)]


FAULTS = (*TENSOR_FAULTS, "not_a_tensor", "dtype")
