"""Random calls of the operator's doors for the fuzzer: right ones and, with a fault, wrong ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from saccade.core import AttentionOutput, BlockSelection, DenseKV, Mask
from saccade.ops import AttentionCall, attend, attention, make_call
from tests.support import faults
from tests.support.layouts import LAYOUTS
from tests.support.random_inputs import generator

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
MASK = ("causal", "window", "sinks")
ONLY_MAKE_CALL = ("attn_mask", "q_offset")
DOORS = ("attention", "make_call", "AttentionCall")
Draw = Any


@dataclass
class Door:
    """A call by one of the doors, its arguments, and whether it is wrong.

    Attributes:
        given: q, k, v and options; name: one of DOORS.
        wrong: the call has to be refused by every backend; fault: what is wrong.
        poisoned: keys that nobody attends to hold NaN.
    """

    given: dict[str, Any]
    name: str
    wrong: bool
    fault: str
    grad: bool
    poisoned: Tensor | None

    def run(self, backend: str, **changes: Any) -> AttentionOutput:
        """The result through the door."""
        given = self.given | changes
        q, k, v = (given.pop(name) for name in "qkv")
        if self.name == "attention":
            found = attention(q, k, v, return_lse=True, backend=backend, **given)
            assert isinstance(found, AttentionOutput)
            return found
        mask = Mask(**{name: given.pop(name) for name in MASK if name in given})
        if self.name == "make_call":
            return attend(make_call(q, DenseKV(k, v), mask=mask, **given), backend=backend)
        own = {"scale": 0.5, "q_offset": 0} | given  # an AttentionCall has no defaults
        return attend(AttentionCall(q=q, kv=DenseKV(k, v), mask=mask, **own), backend=backend)


@st.composite
def doors(draw: Draw) -> Door:
    """A call of any shape, layout, dtype and options."""
    batch, kv_heads = draw(st.integers(0, 3)), draw(st.integers(1, 3))
    heads = kv_heads * draw(st.sampled_from([1, 1, 2, 3, 5]))
    q_len, k_len = draw(st.sampled_from(LENGTHS)), draw(st.sampled_from(LENGTHS))
    dim = draw(st.sampled_from([1, 2, 8, 16, 17, 24, 40, 64]))
    value_dim = draw(st.sampled_from([dim, dim, dim, 1, 7, 48]))
    source = generator(draw(st.integers(0, 2**16)))
    dtype = draw(st.sampled_from(FLOATS))
    given: dict[str, Any] = {}
    shapes = ((heads, q_len, dim), (kv_heads, k_len, dim), (kv_heads, k_len, value_dim))
    for name, shape in zip("qkv", shapes, strict=True):
        x = torch.randn(batch, *shape, generator=source)
        other = draw(st.integers(0, 11)) == 0
        x = x.to(draw(st.sampled_from(FLOATS)) if other else dtype)
        given[name] = LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))](x)
    name = draw(st.sampled_from(DOORS))
    given |= draw(_options(given, name != "attention", source))
    poisoned = _poison(given, draw(st.booleans()))
    door = Door(given, name, False, "", draw(st.booleans()), poisoned)
    if draw(st.integers(0, 2)) == 0:
        _spoil(draw, door)
    return door


LENGTHS = [0, 1, 1, 2, 3, 5, 8, 17, 33, 40, 70]


def _spoil(draw: Draw, door: Door) -> None:
    """One fault, which makes the call wrong."""
    pick = draw(st.integers(0, 20))
    if draw(st.booleans()):
        name, fault = draw(st.sampled_from("qkv")), draw(st.sampled_from(faults.FAULTS))
        door.wrong, door.fault = faults.spoil_tensor(door.given, name, fault, pick), fault
    else:
        names = [
            n for n in faults.WRONG_OPTIONS if door.name != "attention" or n not in ONLY_MAKE_CALL
        ]
        name = draw(st.sampled_from(names))
        faults.spoil_option(door.given, name, pick)
        door.wrong, door.fault = True, name


@st.composite
def _options(draw: Draw, given: dict[str, Any], by_call: bool, source: torch.Generator) -> Any:
    (batch, heads, q_len, _), (kv_heads, k_len) = given["q"].shape, given["k"].shape[1:3]
    found: dict[str, Any] = {}
    if draw(st.booleans()):
        found["causal"] = draw(st.booleans())
    if found.get("causal", True) and draw(st.booleans()):
        found["window"] = draw(st.sampled_from([1, 2, 7, 30, 2**31, 10**400]))
        found["sinks"] = draw(st.sampled_from([0, 1, 5, 2**40]))
    if draw(st.integers(0, 2)) == 0:
        found["scale"] = draw(st.sampled_from([0.0, -0.0, -0.3, 1, 0.1, -1e-30, 1e-3]))
    if draw(st.integers(0, 4)) == 0:
        found["softcap"] = draw(st.sampled_from([1, 0.5, 30.0, 1e-3, 1e6]))
    if draw(st.integers(0, 3)) == 0:
        found["sink_logits"] = torch.randn(heads, generator=source)
    if draw(st.integers(0, 3)) == 0:
        shape = draw(st.sampled_from([(heads,), (batch, heads)]))
        found["alibi_slopes"] = torch.rand(shape, generator=source)
    extra = draw(st.sampled_from(["", "", "padding", "lens", "blocks", "mask", "packed", "offset"]))
    if extra == "packed" and batch != 1:
        return found
    if by_call or extra not in ("mask", "offset"):
        found |= _extra(extra, (batch, heads, q_len), (kv_heads, k_len), draw, source)
    return found


def _extra(
    name: str, rows: tuple[int, ...], keys: tuple[int, int], draw: Draw, source: torch.Generator
) -> dict[str, Any]:
    """Options that are tensors beside the scores."""
    (batch, heads, q_len), (kv_heads, k_len) = rows, keys

    def some(*shape: int, share: float = 0.6) -> Tensor:
        return torch.rand(shape, generator=source) < share

    def ints(low: int, high: int) -> Tensor:
        return torch.randint(low, high + 1, (batch,), generator=source)

    if name == "padding":
        return {"key_padding": some(batch, k_len)}
    if name == "lens":
        return {"kv_lens": ints(0, k_len)}
    if name == "offset":
        return {"q_offset": draw(st.sampled_from([0, 3, -2, 50, ints(-3, 60)]))}
    if name == "mask":
        shape = (draw(st.sampled_from([1, batch])), draw(st.sampled_from([1, heads])))
        mask = some(*shape, q_len, k_len)
        return {"attn_mask": LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))](mask)}
    if name == "blocks":
        q_block, k_block = draw(st.sampled_from([1, 4, 16])), draw(st.sampled_from([1, 8, 16]))
        grid = some(batch, kv_heads, -(-q_len // q_block) + 1, -(-k_len // k_block))
        return {"blocks": BlockSelection(allowed=grid, q_block=q_block, k_block=k_block)}
    if name == "packed":
        cut = (draw(st.integers(0, q_len)), draw(st.integers(0, k_len)))
        bounds = [torch.tensor([0, c, n]) for c, n in zip(cut, (q_len, k_len), strict=True)]
        return {"cu_seqlens": (bounds[0], bounds[1].int())}
    return {}


def _poison(given: dict[str, Any], wanted: bool) -> Tensor | None:
    """NaN in keys that no query may attend to: bool `[batch, keys]` of them, or None."""
    keys, padding, lens = given["k"].shape[2], given.get("key_padding"), given.get("kv_lens")
    if not wanted or (padding is None and lens is None):
        return None
    unseen = ~padding if padding is not None else torch.arange(keys) >= lens[:, None]
    for name in "kv":
        x = given[name]
        given[name] = x.masked_fill(unseen[:, None, :, None], torch.nan)
    return unseen
