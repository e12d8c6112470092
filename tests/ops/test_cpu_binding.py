"""Bad input to the raw binding of the C++ kernels: every field is checked before a kernel runs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade.core import DenseKV, Mask, PagedKV, RaggedKV
from saccade.ops import attend, attention, make_call
from saccade.ops.attention.cpu import binding
from tests.ops.test_cpu import quantized
from tests.support.random_inputs import normal

_cpu = binding.extension()
pytestmark = pytest.mark.skipif(_cpu is None, reason="built without the C++ kernels")


def raw_call(kv=None):
    """Arguments of a valid call, as a list to spoil, and the tensors they point to."""
    q = normal(2, 4, 3, 16)
    kv = kv or DenseKV(normal(2, 2, 20, 16), normal(2, 2, 20, 16))
    out, lse = torch.empty(2, 4, 3, 16), torch.empty(2, 4, 3)
    records = [binding.record(x) for x in (q, out, lse)]
    view = binding.VIEWS[type(kv)](kv)
    return [*records, view, True, -1, 0, 0.25, 0.0, 17, None, 2, ""], (q, kv, out, lse)


def paged():
    k, table = normal(6, 2, 8, 16), torch.arange(6, dtype=torch.int32).view(2, 3)
    return PagedKV(k, normal(6, 2, 8, 16), table, torch.tensor([20, 9], dtype=torch.int32), 20)


def ragged():
    table = torch.arange(8, dtype=torch.int32).view(2, 2, 2)
    kv_lens = torch.tensor([[16, 3], [0, 9]], dtype=torch.int32)
    at = torch.randint(0, 20, (8, 8), dtype=torch.int32)
    return RaggedKV(normal(8, 8, 16), normal(8, 8, 16), at, table, kv_lens, 20, 16)


def views():
    qdata = quantized(2, 2, 32, 5, 16, 8, group=16, v_group=16, dtype=torch.float32)
    return [None, paged(), ragged(), qdata]


def test_raw_calls_are_valid_before_they_are_spoilt():
    for kv in views():
        args, alive = raw_call(kv)
        _cpu.attend(*args)
        assert alive[2].isfinite().all()


def spoil_record(record, what, amount):
    address, code, shape, strides, reach = record
    axis = amount % len(shape)
    huge = [2**62, -1, 2**31, 2**40, -(2**63)][amount % 5]
    if what == "null":
        address = 0
    elif what == "unaligned":
        address += 1
    elif what == "dtype":
        code = [9, -1, 5, 2**40][amount % 4]
    elif what == "shape":
        shape = (*shape[:axis], huge, *shape[axis + 1 :])
    elif what == "strides":
        strides = (*strides[:axis], huge, *strides[axis + 1 :])
    elif what == "reach":
        reach = 3
    elif what == "rank":
        shape, strides = shape[1:], strides[1:]
    return address, code, tuple(shape), tuple(strides), reach


@settings(max_examples=200, deadline=None)
@given(
    view=st.integers(0, 3),
    part=st.integers(0, 11),
    what=st.sampled_from(["null", "unaligned", "dtype", "shape", "strides", "reach", "rank"]),
    amount=st.integers(0, 100),
)
def test_spoilt_tensors(view, part, what, amount):
    args, alive = raw_call(views()[view])
    out, lse = alive[2:]
    fields = list(args[3])
    places = [i for i, x in enumerate(fields) if isinstance(x, tuple) and len(x) == 5]
    if part < 3:
        record = args[part]
    else:
        record = fields[places[part % len(places)]]
    spoilt = spoil_record(record, what, amount)
    if part < 3:
        args[part] = spoilt
    else:
        fields[places[part % len(places)]] = spoilt
        args[3] = tuple(fields)
    out.fill_(7), lse.fill_(7)
    if what == "unaligned" and spoilt[1] == 3:
        return  # bytes are aligned anywhere
    if what == "strides" and spoilt[2][amount % len(spoilt[2])] == 1:
        return  # the stride of a dimension of size 1 is never used
    with pytest.raises(ValueError):
        _cpu.attend(*args)
    assert (out == 7).all() and (lse == 7).all()  # nothing ran


@settings(max_examples=150, deadline=None)
@given(
    field=st.sampled_from(["window", "sinks", "threads", "q_offset", "target", "softcap"]),
    value=st.sampled_from([-(2**62), -5, 2**62, 2**31]),
)
def test_spoilt_numbers(field, value):
    args, alive = raw_call()
    assert len(alive) == 4  # the binding gets addresses: the tensors have to stay alive
    places = {"window": 5, "sinks": 6, "softcap": 8, "q_offset": 9, "threads": 11, "target": 12}
    args[places[field]] = "riscv" if field == "target" else value
    harmless = (field in ("window", "sinks", "softcap") and value > 0) or (
        field == "q_offset" and value == -5
    )
    if harmless:
        _cpu.attend(*args)
    else:
        with pytest.raises(ValueError):
            _cpu.attend(*args)


@pytest.mark.parametrize("entry", [-1, 6, 2**31 - 1])
def test_bad_block_table(entry):
    kv = paged()
    kv.page_table[1, 1] = entry
    with pytest.raises(ValueError, match="table entry"):
        attend(make_call(normal(2, 4, 3, 16), kv, mask=Mask()), backend="cpu")
    kv.page_table[1, 1] = 4
    kv.page_table[1, 2] = entry  # behind the length of its row: never read
    attend(make_call(normal(2, 4, 3, 16), kv, mask=Mask()), backend="cpu")


def test_bad_lengths():
    kv = paged()
    for length in (-1, 25):
        kv.kv_lens[0] = length
        with pytest.raises(ValueError, match="length"):
            attend(make_call(normal(2, 4, 3, 16), kv, mask=Mask(), q_offset=3), backend="cpu")
    with pytest.raises(ValueError, match="kv_lens must be 0 to 3, got -1"):
        q = normal(2, 4, 3, 16)
        attention(q, q, q, kv_lens=torch.tensor([3, -1]), backend="cpu")


def test_overlapping_memory():
    args, (q, _, out, _) = raw_call()
    for victim in (q, out[:, :, :1].expand(2, 4, 3, 16)):
        spoilt = list(args)
        spoilt[1] = binding.record(victim)
        with pytest.raises(ValueError, match="overlaps"):
            _cpu.attend(*spoilt)


def test_reading_alone_checks_its_memory():
    memory = torch.ones(1 << 16)
    good = binding.record(memory)
    _cpu.read_through(good, 2)
    spoilt = {
        "dtype": (good[0], 1, *good[2:]),
        "stride": (*good[:3], (2,), good[4]),
        "length": (*good[:2], (1 << 17,), *good[3:]),
        "short": (*good[:2], (5,), *good[3:]),
        "address": (0, *good[1:]),
        "alignment": (good[0] + 1, *good[1:]),
    }
    for fields in spoilt.values():
        with pytest.raises(ValueError, match=r"vector"):
            _cpu.read_through(fields, 2)
    with pytest.raises(ValueError, match="threads"):
        _cpu.read_through(good, 0)
