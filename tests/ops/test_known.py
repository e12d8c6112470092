"""Calls of a known signature: right results, every check again, nothing kept of a tensor."""

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from saccade.core import BlockSelection, DenseKV, Mask, PagedKV, Span, Unsupported
from saccade.ops import attend, attention, make_call
from saccade.ops.attention import dispatch, known
from tests.ops.test_cpu import quantized
from tests.ops.test_cpu_binding import paged, ragged
from tests.support.random_inputs import normal


@pytest.fixture(autouse=True)
def _nothing_is_known():
    known.clear()
    yield
    known.clear()


def qkv(length=20, dtype=torch.float32):
    q, k, v = normal(2, 4, 3, 16), normal(2, 2, length, 16), normal(2, 2, length, 16)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def exact(q, k, v, **options):
    return attention(q.double(), k.double(), v.double(), backend="reference", **options)


OPTIONS = {
    "plain": {},
    "all": {"causal": False},
    "window": {"window": 5, "sinks": 2},
    "scores": {"scale": 0.3, "softcap": 4.0},
    "an integer scale": {"scale": 1},
    "lengths": {"kv_lens": torch.tensor([20, 9])},
    "padding": {"key_padding": torch.arange(20)[None].expand(2, 20) > 3},
    "slopes": {"alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 0.0])},
    "sinks in bfloat16": {"sink_logits": torch.tensor([0.5, 0.25, 1.0, -2.0]).bfloat16()},
    "blocks": {"blocks": BlockSelection(allowed=torch.ones(1, 1, 1, 2) > 0, q_block=8, k_block=16)},
}


@pytest.mark.parametrize("backend", ["auto", "cpu", "sdpa", "tiled"])
@pytest.mark.parametrize("name", OPTIONS)
def test_later_calls_have_the_numbers_of_their_own_tensors(name, backend):
    if backend == "sdpa" and "softcap" in OPTIONS[name]:
        pytest.skip("PyTorch's kernels have no softcap")
    for _ in range(3):
        q, k, v = qkv()
        ours = attention(q, k, v, backend=backend, **OPTIONS[name])
        assert torch.allclose(ours.double(), exact(q, k, v, **OPTIONS[name]), atol=1e-5)
    assert len(known._known) <= 2  # ours, and the reference's in float64


def views():
    ring = (Span(0, 4, 12), Span(12, 16, 8))
    return {
        "dense": lambda: DenseKV(*qkv()[1:]),
        "ring": lambda: DenseKV(*qkv()[1:], ring),
        "paged": paged,
        "ragged": ragged,
        "quantized": lambda: quantized(2, 2, 32, 5, 16, 8, group=16, v_group=16, dtype=q_type),
    }


q_type = torch.float32


@pytest.mark.parametrize("at", ["default", "a number", "a tensor"])
@pytest.mark.parametrize("name", views())
def test_views_of_a_known_signature(name, at):
    for shift in range(3):
        q, kv = qkv()[0], views()[name]()
        start = {"default": None, "a number": 17, "a tensor": torch.tensor([17, 15 + shift])}[at]
        call = make_call(q, kv, mask=Mask(), q_offset=start)
        assert (call.known is not None) and (shift == 0 or "auto" in str(call.known.backends))
        ours = attend(call)
        truth = attend(make_call(q, kv, mask=Mask(), q_offset=start), backend="reference")
        assert torch.allclose(ours.out, truth.out, atol=1e-5)
        assert torch.allclose(ours.lse, truth.lse, atol=1e-5)


def test_numbers_are_checked_in_every_call():
    q, k, v = qkv()
    good = {"kv_lens": torch.tensor([20, 9])}
    for _ in range(2):
        attention(q, k, v, **good)
        with pytest.raises(ValueError, match="kv_lens must be 0 to 20, got 21"):
            attention(q, k, v, kv_lens=torch.tensor([20, 21]))
        make_call(q, DenseKV(k, v), mask=Mask(), q_offset=torch.tensor([3, 4]))
        with pytest.raises(ValueError, match="q_offset"):
            make_call(q, DenseKV(k, v), mask=Mask(), q_offset=torch.tensor([3, 2**40]))


@pytest.mark.parametrize(
    "wrong",
    [
        {"causal": 1}, {"window": 5.0}, {"window": True}, {"sinks": 0.0}, {"scale": True},
        {"scale": float("nan")}, {"softcap": True}, {"return_lse": 0}, {"backend": []},
        {"backend": "fastest"}, {"key_padding": torch.ones(2, 20)}, {"kv_lens": [20, 20]},
    ],
    ids=str,
)  # fmt: skip
def test_what_equals_a_good_option_and_is_none_is_refused_later_too(wrong):
    """True == 1 == 1.0: a dictionary alone would take one for the other."""
    q, k, v = qkv()
    good = {name: {"window": 5, "softcap": 1.0}.get(name) for name in ("window", "softcap")}
    for _ in range(2):
        attention(q, k, v, causal=True, window=1, sinks=0, scale=1.0)
        attention(q, k, v, **good)
        with pytest.raises((TypeError, ValueError)):
            attention(q, k, v, **{"window": 5 if "sinks" in wrong else None, **wrong})


def test_tensors_that_do_not_fit_are_refused_after_some_that_do():
    q, k, v = qkv()
    for _ in range(2):
        attention(q, k, v)
        for wrong in ((q, k, v[:, :, 1:]), (q[..., 1:], k, v), (q, k.bfloat16(), v.long())):
            with pytest.raises((TypeError, ValueError)):
                attention(*wrong)
        with pytest.raises(Unsupported, match="resolve_neg"):
            attention(torch.complex(q, q).conj().imag, k, v)
        with pytest.raises(TypeError):
            attention(q.to_sparse(), k, v)


def test_storage_that_shrank_is_never_read():
    q, k, v = qkv()
    attention(q, k, v, backend="cpu")
    attention(q, k, v, backend="cpu")
    v.untyped_storage().resize_(64)
    with pytest.raises(ValueError, match="storage"):
        attention(q, k, v, backend="cpu")


def test_gradients_are_found_after_calls_without_them():
    q, k, v = (x.requires_grad_() for x in qkv())
    for _ in range(2):
        with torch.no_grad():
            assert not attention(q, k, v).requires_grad
        attention(q, k, v).sum().backward()
    assert q.grad is not None and q.grad.abs().sum() > 0


def test_a_call_described_without_gradients_trains_where_they_are_enabled():
    q, k, v = (x.requires_grad_() for x in qkv())
    for _ in range(2):
        with torch.no_grad():
            call = make_call(q, DenseKV(k, v), mask=Mask())
            attend(call)
        assert attend(call).out.requires_grad


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_transformations_see_operators_after_plain_calls():
    q, k, v = qkv()
    plain = [attention(q, k, v) for _ in range(2)][1]
    with pytest.raises(Unsupported, match="vmap"):
        torch.vmap(lambda x: attention(x, k, v))(q[None])
    _, tangent = torch.func.jvp(lambda x: attention(x, k, v), (q,), (q,))
    assert tangent.abs().sum() > 0
    compiled = torch.compile(lambda x: attention(x, k, v), backend="eager")(q)
    assert torch.allclose(compiled, plain, atol=1e-6)


def test_no_tensor_is_kept():
    q, k, v = qkv()
    lens = torch.tensor([20, 9])
    watched = [weakref.ref(x) for x in (q, k, v, lens)]
    for _ in range(2):
        attention(q, k, v, kv_lens=lens)
        attend(make_call(q, DenseKV(k, v), mask=Mask(), kv_lens=lens))
    del q, k, v, lens
    gc.collect()
    assert [x() for x in watched] == [None] * 4


def test_signatures_are_dropped_before_they_are_too_many(monkeypatch):
    monkeypatch.setattr(known, "MOST", 5)
    for length in range(3, 20):
        attention(*qkv(length))
        assert 0 < len(known._known) <= 5


def test_many_threads_may_meet_new_signatures(monkeypatch):
    monkeypatch.setattr(known, "MOST", 3)

    def compute(length):
        q, k, v = qkv(3 + length % 7)
        return torch.allclose(attention(q, k, v).double(), exact(q, k, v), atol=1e-5)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(compute, range(60)))


def test_another_number_of_threads_is_another_choice():
    q, k, v = qkv()
    call = make_call(q, DenseKV(k, v), mask=Mask())
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            attend(call)
            attend(call)
    finally:
        torch.set_num_threads(before)
    assert len(call.known.backends) == 2


def test_changed_copies_of_a_call_are_checked_from_the_start():
    q, k, v = qkv()
    call = make_call(q, DenseKV(k, v), mask=Mask())
    assert call.known is not None and replace(call, scale=2.0).known is None
    with pytest.raises(ValueError):
        call.with_(q=q[..., :4])


def test_a_backend_that_refuses_is_asked_again():
    q, k, v = (x.double() for x in qkv())
    for _ in range(2):
        attention(q, k, v)
        with pytest.raises(Unsupported, match="float64"):
            attention(q, k, v, backend="cpu")
    assert dispatch.remembered(make_call(q, DenseKV(k, v), mask=Mask()), "cpu") is None


def test_views_keep_what_they_were_made_of():
    kv = paged()
    longer = PagedKV(kv.k, kv.v, kv.page_table, kv.kv_lens + 1, 21)
    q = normal(2, 4, 3, 16)
    for _ in range(2):
        outs = [attend(make_call(q, view, mask=Mask())).out for view in (kv, longer)]
        truths = [
            attend(make_call(q, view, mask=Mask()), backend="reference").out
            for view in (kv, longer)
        ]
        for out, truth in zip(outs, truths, strict=True):
            assert torch.allclose(out, truth, atol=1e-5)
