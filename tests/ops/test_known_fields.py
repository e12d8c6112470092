"""Signatures of calls: whatever field of a view or a selection differs, the signature differs."""

from dataclasses import fields

import pytest
import torch
from torch import Tensor

from saccade.core import BlockSelection, DenseKV, PagedKV, QuantizedKV, RaggedKV, Span
from saccade.ops.attention import known
from tests.ops.test_cpu import quantized
from tests.ops.test_cpu_binding import paged, ragged
from tests.support.random_inputs import normal

VIEWS = {
    DenseKV: lambda: DenseKV(normal(2, 2, 20, 16), normal(2, 2, 20, 16)),
    PagedKV: paged,
    RaggedKV: ragged,
    QuantizedKV: lambda: quantized(2, 2, 32, 5, 16, 8, group=16, v_group=16, dtype=torch.float32),
    BlockSelection: lambda: BlockSelection(
        allowed=torch.ones(1, 1, 1, 2) > 0, q_block=8, k_block=16
    ),
}


def signature(kv):
    q = normal(2, 4, 3, 16).new_zeros(2, 4, 3, 16)
    if isinstance(kv, BlockSelection):
        others = tuple(kv if at == 4 else None for at in range(len(known.NO_OTHERS)))
        view = normal(2, 2, 20, 16)
        return known.signature_of(q, (view, view), (), others)
    return known.signature_of(q, kv, (), known.NO_OTHERS)


def altered(x):
    """Everything a field may become that kernels or checks would treat differently."""
    if isinstance(x, Tensor):
        tensor = {torch.bool: torch.uint8, torch.uint8: torch.int16}.get(x.dtype, torch.float64)
        yield x.to(tensor)
        yield x[..., :-1].clone()  # another shape
        yield x.repeat_interleave(2, -1)[..., ::2]  # other strides
        shifted = torch.empty(x.numel() + 1, dtype=x.dtype)[1:]
        yield shifted.view(x.shape)  # another alignment
        if x.is_floating_point():
            yield x.clone().requires_grad_()
            yield torch._neg_view(x)
        yield x.to("meta")
    elif isinstance(x, tuple) and hasattr(x, "_fields"):  # the parts of a QuantizedTensor
        for name in x._fields:
            yield from (x._replace(**{name: part}) for part in altered(getattr(x, name)))
    elif isinstance(x, bool):
        yield not x
    elif isinstance(x, int):
        yield x + 1
    elif isinstance(x, tuple):
        yield (*x, Span(0, 0, 20))
    else:
        assert x is None, f"a field of a new kind, {type(x)}: say here what it may become"
        yield 7


def with_field(kv, name, value):
    """A copy of which one field is another one, whatever the checks would say to it."""
    copy = object.__new__(type(kv))
    for field in fields(kv):
        object.__setattr__(copy, field.name, getattr(kv, field.name))
    object.__setattr__(copy, name, value)
    return copy


@pytest.mark.parametrize(
    ("kind", "name"),
    [(kind, field.name) for kind in VIEWS for field in fields(kind)],
    ids=lambda x: x if isinstance(x, str) else x.__name__,
)
def test_a_field_that_changes_changes_the_signature(kind, name):
    kv = VIEWS[kind]()
    before = signature(kv)
    assert before is not None and signature(with_field(kv, name, getattr(kv, name))) == before
    values = list(altered(getattr(kv, name)))
    assert values
    for value in values:
        assert signature(with_field(kv, name, value)) != before


def test_every_kind_of_view_is_tried():
    assert known._VIEWS.keys() == {tuple, *VIEWS} - {BlockSelection}
