"""A plan repeats a launch: the same arguments in their places, and only for calls of one form."""

import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels have no plans", allow_module_level=True)

from saccade.core import DenseKV, Mask, PagedKV, RaggedKV, Span
from saccade.ops import attend, tuning
from saccade.ops.attend import triton, triton_decode, triton_plans, triton_views


class Recorder:
    """Stands for a kernel: binds arguments as Triton does; what it compiled takes them bound."""

    def __init__(self, kernel):
        self.arg_names = kernel.arg_names
        self.long, self.short = [], []

    def __getitem__(self, grid):
        def compile_and_run(*args, **named):
            bound = dict(zip(self.arg_names, args, strict=False)) | named
            self.long.append((grid, [bound[name] for name in self.arg_names]))
            return Compiled(self)

        return compile_and_run


class Compiled:
    def __init__(self, recorder):
        self.recorder = recorder

    def __getitem__(self, grid):
        return lambda *args: self.recorder.short.append((grid, list(args)))


@pytest.fixture
def kernels(monkeypatch):
    """Both kernels replaced; CPU tensors pass for those of a card with 132 multiprocessors."""
    found = Recorder(triton_decode.decode_kernel), Recorder(triton_decode.merge_kernel)
    monkeypatch.setattr(triton_views, "decode_kernel", found[0])
    monkeypatch.setattr(triton_views, "merge_kernel", found[1])
    monkeypatch.setattr(triton_plans, "PLANNED", ("cuda", "cpu"))
    monkeypatch.setattr(triton, "_missing", lambda device: None)
    monkeypatch.setattr(tuning, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(tuning, "multiprocessors", lambda device: 132)
    triton_views.PLANS.forget()
    yield found
    triton_views.PLANS.forget()


def flat(value):
    """Arguments one by one; tensors by address, own space (an address) by a word."""
    if isinstance(value, tuple):
        return [part for x in value for part in flat(x)]
    if isinstance(value, torch.Tensor):
        return [("tensor", value.data_ptr() % 16)]
    if isinstance(value, int) and value > 2**32:
        return [("tensor", value % 16)]
    return [value]


def dense(length, batch=1, dim=128):
    k, v = torch.randn(batch, 8, length, dim), torch.randn(batch, 8, length, dim)
    return DenseKV(k.bfloat16(), v.bfloat16())


def ring(length):
    kv = dense(length + 10)
    spans = (Span(0, 0, 2), Span(12, 2, length - 10), Span(4, length - 8, 8))
    return DenseKV(kv.k, kv.v, spans)


def paged(length):
    k = torch.randn(80, 8, 16, 128).bfloat16()
    table, lengths = torch.randperm(80).int()[None], torch.tensor([length], dtype=torch.int32)
    return PagedKV(k, k.clone(), table, lengths, length)


def ragged(length):
    k, positions = torch.randn(700, 16, 128).bfloat16(), torch.zeros(700, 16, dtype=torch.int32)
    table, lengths = torch.randperm(700)[:640].view(1, 8, 80), torch.full((1, 8), length)
    return RaggedKV(k, k.clone(), positions, table.int(), lengths.int(), length, length)


VIEWS = {"dense": dense, "ring": ring, "paged": paged, "ragged": ragged}
MASKS = [Mask(), Mask(window=300), Mask(window=300, sinks=4), Mask(causal=False)]


@pytest.mark.parametrize("kind", VIEWS)
@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize(("queries", "length"), [(1, 1200), (3, 1111), (1, 100)])
def test_a_plan_passes_the_arguments_of_the_long_way(kernels, kind, mask, queries, length):
    q, view = torch.randn(1, 32, queries, 128).bfloat16(), VIEWS[kind](length)
    for _ in range(2):
        attend(q, view, mask=mask, sink_logits=torch.randn(32), backend="triton")
    for kernel in kernels:
        assert len(kernel.long) == len(kernel.short)
        for (grid, long), (again, short) in zip(kernel.long, kernel.short, strict=True):
            assert grid == again
            assert [flat(x) for x in long] == [flat(x) for x in short]
    assert len(kernels[0].long) == 1


def test_a_plan_serves_other_lengths_with_as_many_splits(kernels):
    q = torch.randn(1, 32, 1, 128).bfloat16()
    whole = dense(3000)
    for length in (2900, 2901, 2999, 400):
        view = DenseKV(whole.k[:, :, :length], whole.v[:, :, :length])
        attend(q, view, mask=Mask(), backend="triton")
    assert len(kernels[0].long) == 2  # 16 splits, and the 4 of 400 keys
    names = kernels[0].arg_names
    _, arguments = kernels[0].short[-1]
    assert arguments[names.index("k_len")] == 2999 == arguments[names.index("num_slots")]
    assert arguments[names.index("q_offset")] == 2998


def test_other_forms_get_other_plans(kernels):
    q, view = torch.randn(2, 32, 1, 128).bfloat16(), dense(1000, batch=2)
    storage = torch.randn(2 * 8 * 1000 * 128 + 1).bfloat16()
    odd = storage[1:].view(2, 8, 1000, 128)
    lengths = torch.tensor([900, 800])
    calls = [
        (q, view, {}),
        (q[:1].expand(2, 32, 1, 128), view, {}),
        (q, DenseKV(odd, view.v), {}),
        (q, view, {"softcap": 3.0}),
        (q, view, {"scale": 0.3}),
        (q, view, {"lengths": lengths}),
        (q, view, {"lengths": lengths.repeat_interleave(2)[::2]}),
        (q, DenseKV(view.k.mT.contiguous().mT[:, :, :999], view.v[:, :, :999]), {}),
    ]
    for _ in range(2):
        for x, kv, options in calls:
            attend(x, kv, mask=Mask(), backend="triton", **options)
    assert len(kernels[0].long) == len(kernels[0].short) == len(triton_views.PLANS) == len(calls)


def test_calls_with_masks_of_tensors_have_no_plan(kernels):
    q, view = torch.randn(1, 32, 1, 128).bfloat16(), dense(100)
    for extra in ({"key_padding": torch.ones(1, 100) > 0}, {"alibi_slopes": torch.ones(32)}):
        attend(q, view, mask=Mask(), backend="triton", **extra)
    assert len(triton_views.PLANS) == 0


def test_plans_are_bounded_and_hold_no_tensors(kernels, monkeypatch):
    monkeypatch.setattr(triton_plans, "LIMIT", 3)
    view = dense(100)
    for i in range(10):
        attend(torch.randn(1, 32, 1, 128).bfloat16(), view, mask=Mask(), scale=1 + i / 8,
               backend="triton")  # fmt: skip
        assert len(triton_views.PLANS) <= 3
    for plan in triton_views.PLANS._known.values():
        for step in plan.steps.values():
            parts = [step.strides, step.rules, step.terms, step.scan.fixed, step.merge or ()]
            assert not any(
                isinstance(x, tuple) and x[:1] == ("tensor",) for x in flat(tuple(parts))
            )


def test_a_trial_of_the_tuner_is_not_answered_by_a_plan(kernels):
    q, view = torch.randn(1, 32, 1, 128).bfloat16(), dense(1000)
    attend(q, view, mask=Mask(), backend="triton")
    with tuning.trial(tuning.DECODE, tuning.Launch(64, 32, 4, 2)):
        attend(q, view, mask=Mask(), backend="triton")
    names = kernels[0].arg_names
    assert [arguments[names.index("BLOCK_N")] for _, arguments in kernels[0].long] == [128, 32]
