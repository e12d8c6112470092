"""What does not fit is refused before any kernel runs, at every door and for every backend."""

import pytest
import torch

from saccade.core import BlockSelection, DenseKV, Mask, PagedKV, PerHeadFP8, QuantizedKV
from saccade.core.formats import quantize_keys, quantize_values
from saccade.ops import AttentionCall, attend, attention, make_call
from tests.support import view_doors, views
from tests.support.cases import HERE
from tests.support.fuzzing import assert_sentence
from tests.support.random_inputs import normal, qkv

BACKENDS = ["auto", *HERE]


def by_hand(q, k, v, backend, **options):
    own = {"mask": Mask(), "scale": 0.25, "q_offset": 0} | options
    return attend(AttentionCall(q=q, kv=DenseKV(k, v), **own), backend=backend)


def by_call(q, k, v, backend, **options):
    return attend(make_call(q, DenseKV(k, v), mask=Mask(), **options), backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("door", [by_hand, by_call])
@pytest.mark.parametrize(
    ("q_shape", "k_shape", "v_shape", "text"),
    [
        ((2, 4, 3, 16), (1, 2, 9, 16), (1, 2, 9, 16), "share the batch, got 2 and 1"),
        ((1, 4, 3, 16), (3, 2, 9, 16), (3, 2, 9, 16), "share the batch, got 1 and 3"),
        ((2, 4, 3, 16), (2, 3, 9, 16), (2, 3, 9, 16), "key/value heads, got 4 and 3"),
        ((2, 4, 3, 16), (2, 2, 9, 16), (2, 4, 9, 16), "share batch, heads and length"),
        ((2, 4, 3, 16), (2, 2, 9, 16), (2, 2, 8, 16), "share batch, heads and length"),
        ((2, 4, 3, 16), (2, 2, 9, 8), (2, 2, 9, 16), "share head_dim, got 16 and 8"),
        ((2, 4, 3, 0), (2, 2, 9, 0), (2, 2, 9, 4), "at least one channel"),
        ((2, 0, 3, 16), (2, 2, 9, 16), (2, 2, 9, 16), "got 0 and 2"),
    ],
)  # fmt: skip
def test_shapes_that_do_not_fit(backend, door, q_shape, k_shape, v_shape, text):
    with pytest.raises(ValueError, match=text):
        door(normal(*q_shape), normal(*k_shape), normal(*v_shape), backend)


BAD = {
    "a mask of another batch": {"attn_mask": torch.ones(3, 1, 3, 9) > 0},
    "a mask of fewer keys": {"attn_mask": torch.ones(1, 1, 3, 8) > 0},
    "an additive mask": {"attn_mask": torch.zeros(1, 1, 3, 9)},
    "padding of another length": {"key_padding": torch.ones(2, 8) > 0},
    "lengths beyond the keys": {"kv_lens": torch.tensor([9, 10])},
    "negative lengths": {"kv_lens": torch.tensor([-1, 9])},
    "int32 lengths": {"kv_lens": torch.tensor([1, 9], dtype=torch.int32)},
    "an offset for every head": {"q_offset": torch.zeros(2, 4, dtype=torch.int64)},
    "an offset beyond every position": {"q_offset": 2**31},
    "slopes of integers": {"alibi_slopes": torch.ones(4, dtype=torch.int64)},
    "sinks of another head count": {"sink_logits": torch.ones(2)},
    "a selection of another batch": {
        "blocks": BlockSelection(allowed=torch.ones(3, 1, 3, 3) > 0, q_block=4, k_block=4)
    },
    "a selection of query heads": {
        "blocks": BlockSelection(allowed=torch.ones(2, 4, 3, 3) > 0, q_block=4, k_block=4)
    },
    "lengths on another device": {"kv_lens": torch.tensor([1, 9], device="meta")},
    "packed rows in a batch": {"cu_seqlens": (torch.tensor([0, 3]), torch.tensor([0, 9]))},
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("door", [by_hand, by_call])
@pytest.mark.parametrize("name", BAD)
def test_options_that_do_not_fit(backend, door, name):
    q, k, v = qkv(4, 2, 3, 9, 16)
    with pytest.raises(ValueError, match=r"\.$") as caught:
        door(q, k, v, backend, **BAD[name])
    assert_sentence(caught.value)


@pytest.mark.parametrize("kind", view_doors.KINDS)
def test_every_fault_of_a_view_is_found_when_it_is_made(kind):
    k, v = normal(2, 2, 40, 16), normal(2, 2, 40, 16)
    view = {
        "ring": lambda: views.ring(k, v),
        "paged": lambda: views.paged(k, v, 8),
        "ragged": lambda: views.ragged(k, v, torch.ones(2, 2, 40) > 0),
        "quantized": lambda: views.quantized(k, v, 8, group=16),
        "growing": lambda: views.growing(views.quantized(k, v, 8, group=16)),
        "fp8": lambda: view_doors.fp8(k, v),
    }[kind]()
    for fault, change in view_doors.FAULTS[kind].items():
        with pytest.raises((TypeError, ValueError)) as caught:
            view_doors.replace(view, **change(view))
        assert_sentence(caught.value), fault


def test_pages_past_a_row_may_hold_any_number():
    pool = normal(4, 2, 16, 16)
    table = torch.tensor([[0, 1], [2, -7]], dtype=torch.int32)
    view = PagedKV(pool, pool, table, torch.tensor([20, 16], dtype=torch.int32), 20)
    for backend in BACKENDS:
        out = attend(make_call(normal(2, 4, 1, 16), view, mask=Mask()), backend=backend).out
        assert out.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 4, 0), (0, 4, 0)])
def test_nothing_to_compute(backend, shape):
    batch, heads, q_len = shape
    q, k = torch.empty(batch, heads, q_len, 16), torch.empty(batch, 2, 5, 16)
    lens = torch.full((batch,), 4)
    out, lse = attention(q, k, k, kv_lens=lens, return_lse=True, backend=backend)
    assert out.shape == q.shape and lse.shape == shape


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtypes", [("float32", "bfloat16"), ("float16", "float32")])
def test_values_of_another_dtype_than_keys(backend, dtypes):
    q, k, v = qkv(4, 2, 5, 9, 16)
    k, v = (x.to(getattr(torch, name)) for x, name in zip((k, v), dtypes, strict=True))
    exact = attention(q.double(), k.double(), v.double(), backend="reference")
    try:
        ours = attention(q, k, v, backend=backend)
    except ValueError as error:
        assert backend in ("sdpa", "triton") and "but keys or values are" in str(error)
        return
    assert (ours - exact).abs().max() < 1e-2


@pytest.mark.parametrize("name", ["window", "sinks"])
def test_numbers_of_a_mask_may_be_as_large_as_they_like(name):
    q, k, v = qkv(4, 2, 5, 9, 16)
    options = {"window": 3, "sinks": 0} | {name: 10**400}
    expected = attention(q, k, v, backend="reference")
    for backend in BACKENDS:
        assert torch.allclose(attention(q, k, v, backend=backend, **options), expected, atol=1e-5)


def unseen():
    """Options under which no query attends to the keys 2 and 5."""
    hidden = torch.ones(2, 9, dtype=torch.bool)
    hidden[:, [2, 5]] = False
    grid = torch.ones(1, 1, 1, 9, dtype=torch.bool)
    grid[..., [2, 5]] = False
    return {
        "key_padding": {"key_padding": hidden},
        "attn_mask": {"attn_mask": hidden[:, None, None].expand(2, 4, 9, 9)},
        "blocks": {"blocks": BlockSelection(allowed=grid, q_block=9, k_block=1)},
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", unseen())
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_what_nobody_attends_to_poisons_no_result_and_no_gradient(backend, name, poison):
    if backend == "triton" and name != "key_padding":
        pytest.skip("a hidden key of attn_mask or blocks is a real one, which its kernels multiply")
    options = unseen()[name]
    found = []
    for value, which in ((0.0, "reference"), (poison, backend)):
        q, k, v = (x.clone() for x in qkv(4, 2, 9, 9, 16, batch=2))
        torch.manual_seed(3)
        q, k, v = (torch.randn_like(x) for x in (q, k, v))
        for x in (k, v):
            x[:, :, [2, 5]] = value
        leaves = [x.requires_grad_() for x in (q, k, v)]
        if which == "cpu" and name != "key_padding":  # its gradients take no blocks or attn_mask
            leaves = [x.detach() for x in leaves]
        call = make_call(leaves[0], DenseKV(*leaves[1:]), mask=Mask(), wants_lse=False, **options)
        out = attend(call, backend=which).out
        grads = torch.autograd.grad(out.sin().sum(), leaves) if out.requires_grad else ()
        found.append((out, *grads))
    for true, ours in zip(*found, strict=False):
        assert torch.allclose(ours, true, atol=1e-5)


def test_fp8_numbers_and_scales_belong_together():
    qdata = normal(1, 2, 8, 64).to(torch.float8_e4m3fn)
    for wrong in (
        torch.ones(1, 2, device="meta"),
        None,
        1.0,
        torch.ones(1, 2, requires_grad=True).long(),
    ):
        with pytest.raises(ValueError, match=r"PerHeadFP8.scale .* must be"):
            PerHeadFP8(qdata, wrong)


def test_odd_heads_take_no_four_bits():
    k = normal(1, 1, 16, 16)
    keys, values = quantize_keys(k, bits=4, group=16), quantize_values(k, bits=4, group=16)
    odd = k[..., :15]
    with pytest.raises(ValueError, match="4 for an even number of channels, got 4 for 15"):
        QuantizedKV(keys, values, odd, k, 4, 4, 16)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_default_device_decides_nothing(backend):
    """`with torch.device(...)` is where new tensors go, not where those of a call lie."""
    q, k, v = qkv(4, 2, 3, 9, 16)
    lens = torch.tensor([9, 4])
    expected = attention(q, k, v, kv_lens=lens, backend="reference")
    leaf = q.clone().requires_grad_()
    with torch.device("meta"):
        out = attention(leaf, k, v, kv_lens=lens, backend=backend)
        (grad,) = torch.autograd.grad(out.sum(), leaf)
    assert torch.allclose(out, expected, atol=1e-5) and grad.device.type == "cpu"


def test_tensors_without_memory_give_a_shape_or_a_sentence():
    q, k, v = (x.to("meta") for x in qkv(4, 2, 3, 9, 16))
    assert attention(q, k, v).shape == q.shape
    with pytest.raises(ValueError, match="cannot be read"):
        attention(q, k, v, kv_lens=torch.tensor([9, 4]).to("meta"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_lazily_negated_tensor_is_refused(backend):
    q, k, v = qkv(4, 2, 3, 9, 1)
    turned = torch.complex(k, k).conj().imag
    with pytest.raises(ValueError, match=r"Call resolve_neg\(\)"):
        attention(q, turned, v, backend=backend)
