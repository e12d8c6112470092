"""Random views of keys for the fuzzer, their storage at any strides, and faults of each kind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from saccade.core import DenseKV, Mask, PerHeadFP8KV, Span, quantize_fp8_per_head
from tests.support import views
from tests.support.layouts import SAME_NUMBERS
from tests.support.random_inputs import generator

Draw = Any
KINDS = ("ring", "paged", "ragged", "quantized", "growing", "fp8")
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@dataclass
class ViewDoor:
    """Queries and a view, `strange` with the same numbers at other strides; or how to make a
    wrong view, which must raise."""

    q: Any
    plain: Any
    strange: Any
    options: dict[str, Any]
    wrong: Callable[[], Any] | None
    fault: str


@st.composite
def view_doors(draw: Draw) -> ViewDoor:
    """A call over a random view."""
    kind = draw(st.sampled_from(KINDS))
    batch, kv_heads, groups = (
        draw(st.integers(1, 3)),
        draw(st.integers(1, 2)),
        draw(st.integers(1, 3)),
    )
    dim, q_len = draw(st.sampled_from([8, 16, 24])), draw(st.sampled_from([0, 1, 2, 7, 20]))
    length = draw(st.sampled_from([16, 17, 40, 64]))
    source, dtype = generator(draw(st.integers(0, 999))), draw(st.sampled_from(DTYPES))
    q = torch.randn(batch, kv_heads * groups, q_len, dim, generator=source).to(dtype)
    k, v = (torch.randn(batch, kv_heads, length, dim, generator=source).to(dtype) for _ in "kv")
    plain = _view(kind, k, v, draw, source)
    layout = SAME_NUMBERS[draw(st.sampled_from(sorted(SAME_NUMBERS)))]
    options = _options(kind, (batch, kv_heads * groups, q_len, length), draw, source)
    q = quantize_fp8_per_head(q) if kind == "fp8" else q
    wrong, fault = (None, "")
    if draw(st.integers(0, 2)) == 0:
        fault = draw(st.sampled_from(sorted(FAULTS[kind])))
        wrong = _maker(plain, FAULTS[kind][fault])
    return ViewDoor(q, plain, moved(plain, layout), options, wrong, fault)


def _options(kind: str, sizes: tuple[int, ...], draw: Draw, source: torch.Generator) -> Any:
    """The mask and what else a call over a view may have."""
    batch, heads, q_len, length = sizes
    masks = [{}, {"causal": False}, {"window": 5}, {"window": 9, "sinks": 2}]
    found: dict[str, Any] = {"mask": Mask(**draw(st.sampled_from(masks)))}
    extra = draw(st.sampled_from(["", "", "padding", "lens", "mask", "softcap", "sinks", "offset"]))
    if extra == "padding":
        found["key_padding"] = torch.rand(batch, length, generator=source) < 0.7
    elif extra == "lens" or kind == "growing":
        found["kv_lens"] = torch.randint(0, length + 1, (batch,), generator=source)
    elif extra == "mask" and kind != "ragged":
        found["attn_mask"] = torch.rand(batch, 1, q_len, length, generator=source) < 0.7
    elif extra == "softcap":
        found["softcap"] = 2.0
    elif extra == "sinks":
        found["sink_logits"] = torch.randn(heads, generator=source)
    elif extra == "offset":
        found["q_offset"] = torch.randint(-3, length, (batch,), generator=source)
    return found


def _maker(view: Any, change: Callable[[Any], dict[str, Any]]) -> Callable[[], Any]:
    return lambda: replace(view, **change(view))


def _view(kind: str, k: Tensor, v: Tensor, draw: Draw, source: torch.Generator) -> Any:
    batch, _, length, _ = k.shape
    if kind == "ring":
        return views.ring(k, v)
    if kind == "paged":
        lens = torch.randint(0, length + 1, (batch,), generator=source).tolist()
        return views.paged(k, v, draw(st.sampled_from([1, 4, 16])), [length, *lens[1:]])
    if kind == "ragged":
        kept = torch.rand(k.shape[:3], generator=source) < 0.5
        kept[0, 0, 0] = True
        return views.ragged(k, v, kept, draw(st.sampled_from([1, 8])))
    if kind == "fp8":
        return fp8(k, v)
    bits = draw(st.sampled_from([4, 8]))
    view = views.quantized(k, v, length % 16, bits=bits, group=16)
    return views.growing(view) if kind == "growing" else view


def fp8(k: Tensor, v: Tensor) -> PerHeadFP8KV:
    """Keys and values quantized to fp8 with a scale per head."""
    keys, values = quantize_fp8_per_head(k), quantize_fp8_per_head(v)
    return PerHeadFP8KV(DenseKV(keys.qdata, values.qdata), keys.scale, values.scale)


def moved(x: Any, layout: Callable[[Tensor], Tensor]) -> Any:
    """A view whose tensors of three or more dimensions lie in another layout."""
    if isinstance(x, Tensor):
        return layout(x) if x.ndim > 2 else x.repeat_interleave(2, -1)[..., ::2]
    if isinstance(x, tuple) and hasattr(x, "_fields") and not isinstance(x, Span):
        return type(x)(*(moved(part, layout) for part in x))
    if not hasattr(x, "__dataclass_fields__"):
        return x
    return type(x)(**{f.name: moved(getattr(x, f.name), layout) for f in fields(x)})


def _with(x: Tensor, value: int) -> Tensor:
    x = x.clone()
    x.view(-1)[0] = value
    return x


Change = dict[str, Callable[[Any], dict[str, Any]]]
_STORAGE: Change = {
    "v_shorter": lambda x: {"v": x.v[:, :, :-1]} if x.v.ndim == 4 else {"v": x.v[:, :-1]},
    "k_integers": lambda x: {"k": x.k.long()},
    "v_rank": lambda x: {"v": x.v[0]},
    "v_elsewhere": lambda x: {"v": x.v.to("meta")},
    "no_channels": lambda x: {"k": x.k[..., :0]},
    "sparse": lambda x: {"k": x.k.contiguous().to_sparse()},
    "none": lambda x: {"v": None},
}
_TABLE: Change = {
    "page_beyond": lambda x: {"page_table": _with(x.page_table, x.k.shape[0])},
    "page_before": lambda x: {"page_table": _with(x.page_table, -1)},
    "long_table": lambda x: {"page_table": x.page_table.long()},
    "narrow_table": lambda x: {"page_table": x.page_table[..., :0]},
    "table_elsewhere": lambda x: {"page_table": x.page_table.to("meta")},
    "too_long": lambda x: {"kv_lens": _with(x.kv_lens, 10**6)},
    "negative": lambda x: {"kv_lens": _with(x.kv_lens, -1)},
    "lens_of_long": lambda x: {"kv_lens": x.kv_lens.long()},
    "lens_of_another_batch": lambda x: {"kv_lens": x.kv_lens[:-1]},
    "end_is_a_float": lambda x: {"end": float(x.end)},
    "end_is_negative": lambda x: {"end": -1},
}
_QUANTIZED: Change = {
    "bits": lambda x: {"bits_k": 3},
    "other_bits": lambda x: {"bits_v": 12 - x.bits_v},
    "group": lambda x: {"k_group": 7},
    "no_group": lambda x: {"k_group": 0},
    "float_group": lambda x: {"k_group": 16.0},
    "not_quantized": lambda x: {"k": x.recent_k},
    "recent_heads": lambda x: {"recent_k": x.recent_k[:, :0]},
    "recent_values": lambda x: {"recent_v": x.recent_v[..., :-1]},
    "scale_dtype": lambda x: {"k": x.k._replace(scale=x.k.scale.float())},
    "scale_shape": lambda x: {"v": x.v._replace(scale=x.v.scale[:, :, :-1])},
    "offset_shape": lambda x: {"k": x.k._replace(offset=x.k.offset[..., :-1])},
    "fewer_values": lambda x: {"v": type(x.v)(*(part[:, :, :-1] for part in x.v))},
    "qdata_elsewhere": lambda x: {"k": x.k._replace(qdata=x.k.qdata.to("meta"))},
}
FAULTS: dict[str, Change] = {
    "ring": _STORAGE | {
        "beyond": lambda x: {"spans": (Span(0, 0, x.k.shape[2] + 1),)},
        "overlap": lambda x: {"spans": (Span(0, 0, 4), Span(2, 4, 4))},
        "descending": lambda x: {"spans": (Span(0, 5, 4), Span(4, 0, 4))},
        "negative_slot": lambda x: {"spans": (Span(-1, 0, 4),)},
        "float_span": lambda x: {"spans": (Span(0, 0, 4.0),)},
    },
    "paged": _STORAGE | _TABLE | {"end_too_small": lambda x: {"end": x.end - 1}},
    "ragged": _STORAGE | _TABLE | {
        "positions_dtype": lambda x: {"positions": x.positions.long()},
        "positions_shape": lambda x: {"positions": x.positions[:-1]},
        "length_too_small": lambda x: {"max_length": x.max_length - 1},
    },
    "quantized": _QUANTIZED,
    "growing": {
        "beyond": lambda x: {"num_quantized": x.num_quantized + 10**6},
        "negative": lambda x: {"num_quantized": x.num_quantized * 0 - 1},
        "dtype": lambda x: {"num_quantized": x.num_quantized.float()},
        "number": lambda x: {"num_quantized": 3},
        "stored": lambda x: {"stored": DenseKV(x.stored.recent_k, x.stored.recent_v)},
        "recursive": lambda x: {"stored": x},
    },
    "fp8": {
        "scale_shape": lambda x: {"k_scale": x.k_scale[:, :0]},
        "scale_dtype": lambda x: {"v_scale": x.v_scale.double()},
        "scale_elsewhere": lambda x: {"v_scale": x.v_scale.to("meta")},
        "no_fp8": lambda x: {"qdata": DenseKV(x.qdata.k.float(), x.qdata.v.float())},
        "half_fp8": lambda x: {"qdata": DenseKV(x.qdata.k, x.qdata.v.float())},
        "tensor": lambda x: {"qdata": x.qdata.k},
    },
}  # fmt: skip
