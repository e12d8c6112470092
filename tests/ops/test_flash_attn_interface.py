"""flash-attn's functions of whole sequences: what they compute, against the formulas in float64."""

import inspect

import pytest
import torch

from saccade.core import Unsupported
from saccade.flash_attn_interface import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from tests.support.flash_attn import (
    DEVICES,
    Meaning,
    assert_near,
    batch,
    in_pages,
    inputs,
    packed,
    sequence,
)
from tests.support.random_inputs import normal
from tests.support.tolerance import LSE_ALLOWANCE

WINDOWS = [
    (False, (-1, -1)),
    (True, (-1, -1)),
    (True, (3, 0)),
    (True, (2, 7)),  # causal leaves nothing to the right
    (False, (3, 2)),
    (False, (0, 0)),
    (False, (2, -1)),
    (False, (-1, 2)),
    (False, (-1, 0)),
    (False, (100, 100)),
    (False, (2**40, 2)),
]
SIZES = [  # q_len, k_len, heads, kv_heads
    (7, 7, 4, 4),
    (5, 9, 4, 2),
    (9, 5, 4, 1),
    (1, 8, 6, 3),
    (4, 0, 2, 1),
]
SCORES = {
    "plain": {},
    "softcap": {"softcap": 2.0},
    "scale": {"scale": 0.4},
    "slopes": {"slopes": 1},
    "slopes of rows": {"slopes": 2, "softcap": 3.0},
}


def slopes_of(kind, rows, heads, device="cpu"):
    shape = {1: (heads,), 2: (rows, heads)}.get(kind)
    return None if shape is None else torch.rand(shape, device=device) * 0.5


def meaning_of(causal, window, scores):
    chosen = {name: x for name, x in scores.items() if name != "slopes"}
    return Meaning(causal=causal, window=window, **chosen)


@pytest.mark.parametrize("scores", SCORES.values(), ids=list(SCORES))
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(("causal", "window"), WINDOWS, ids=str)
def test_dense(causal, window, size, scores):
    q, k, v = inputs(*size)
    meaning = meaning_of(causal, window, scores)
    slopes = slopes_of(scores.get("slopes"), 2, size[2])
    out, lse, empty = flash_attn_func(
        q, k, v, alibi_slopes=slopes, return_attn_probs=True, **meaning.keywords
    )
    truth = batch(q, k, v, meaning, slopes)
    assert_near(out, truth[0])
    assert_near(lse, truth[1], LSE_ALLOWANCE)
    assert out.is_contiguous() and lse.dtype == torch.float32 and empty.numel() == 0
    alone = flash_attn_func(q, k, v, alibi_slopes=slopes, **meaning.keywords)
    assert torch.equal(alone, out)


LENGTHS = [([3, 0, 6, 1], [3, 2, 6, 4]), ([1, 1, 1], [5, 9, 2]), ([4, 7], [6, 3])]


def varlen_truth(q, k, v, q_lens, k_lens, meaning, slopes=None):
    outs, lses = [], []
    parts = zip(q.split(q_lens), k.split(k_lens), v.split(k_lens), strict=True)
    for i, part in enumerate(parts):
        own = slopes[i] if slopes is not None and slopes.ndim == 2 else slopes
        out, lse = sequence(*part, meaning, own)
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs), torch.cat(lses, dim=1)


@pytest.mark.parametrize("scores", SCORES.values(), ids=list(SCORES))
@pytest.mark.parametrize("lens", LENGTHS, ids=str)
@pytest.mark.parametrize(("causal", "window"), WINDOWS, ids=str)
def test_varlen(causal, window, lens, scores):
    q, k, v, cu_q, cu_k = packed(*lens, 4, 2)
    meaning = meaning_of(causal, window, scores)
    slopes = slopes_of(scores.get("slopes"), len(lens[0]), 4)
    options = {"alibi_slopes": slopes, "return_attn_probs": True, **meaning.keywords}
    args = (cu_q, cu_k, max(lens[0]), max(lens[1]))
    out, lse, empty = flash_attn_varlen_func(q, k, v, *args, **options)
    truth = varlen_truth(q, k, v, *lens, meaning, slopes)
    assert_near(out, truth[0])
    assert_near(lse, truth[1], LSE_ALLOWANCE)
    assert out.is_contiguous() and empty.numel() == 0


@pytest.mark.parametrize("size", [1, 4, 16])
@pytest.mark.parametrize("lens", LENGTHS, ids=str)
@pytest.mark.parametrize(("causal", "window"), WINDOWS, ids=str)
def test_varlen_over_pages(causal, window, lens, size):
    q, k, v, cu_q, cu_k = packed(*lens, 4, 2)
    meaning, slopes = Meaning(causal, window, softcap=2.0), slopes_of(2, len(lens[0]), 4)
    torch.manual_seed(1)
    k_pages, table = in_pages(k, lens[1], size)
    torch.manual_seed(1)
    v_pages, same = in_pages(v, lens[1], size)
    assert torch.equal(table, same)
    for own in (None, slopes):
        out, lse, _ = flash_attn_varlen_func(
            q,
            k_pages,
            v_pages,
            cu_q,
            cu_k,
            max(lens[0]) + 1,
            max(lens[1]) + 9,
            alibi_slopes=own,
            return_attn_probs=True,
            block_table=table,
            **meaning.keywords,
        )
        truth = varlen_truth(q, k, v, *lens, meaning, own)
        assert_near(out, truth[0])
        assert_near(lse, truth[1], LSE_ALLOWANCE)


def test_tokens_behind_the_last_sequence_are_left_out():
    q, k, v, cu_q, cu_k = packed([3, 2], [4, 5], 4, 2)
    more = [torch.cat([x, torch.full_like(x[:2], torch.nan)]) for x in (q, k, v)]
    expected, _ = varlen_truth(q, k, v, [3, 2], [4, 5], Meaning())
    for window in ((-1, -1), (50, 50)):
        out, lse, _ = flash_attn_varlen_func(
            *more, cu_q, cu_k, 3, 5, window_size=window, return_attn_probs=True
        )
        assert_near(out[:5], expected)
        assert torch.equal(out[5:], torch.zeros_like(out[5:]))
        assert lse[:, 5:].isneginf().all() and lse.shape == (4, 7)
    pages, table = zip(*(in_pages(x, [4, 5], 5, 0) for x in (k, k)), strict=True)
    out = flash_attn_varlen_func(more[0], *pages, cu_q, cu_k, 3, 5, block_table=table[0])
    assert torch.equal(out[5:], torch.zeros_like(out[5:]))


def gradients(function, tensors, weights):
    tensors = [x.detach().clone().requires_grad_() for x in tensors]
    (function(*tensors).double().cpu() * weights).sum().backward()
    return [x.grad for x in tensors]


GRADIENTS = [
    (Meaning(causal=True), None),
    (Meaning(causal=True, window=(3, 0), softcap=2.0), None),
    (Meaning(window=(2, 3)), None),
    (Meaning(window=(2, 3)), 2),
    (Meaning(), 1),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("meaning", "kind"), GRADIENTS, ids=str)
def test_gradients(meaning, kind, device):
    q, k, v = inputs(6, 9, 4, 2, device=device)
    slopes, weights = slopes_of(kind, 2, 4, device), normal(2, 6, 4, 16).double()
    options = {"alibi_slopes": slopes, **meaning.keywords}
    ours = gradients(lambda *x: flash_attn_func(*x, **options), (q, k, v), weights)
    truth = gradients(lambda *x: batch(*x, meaning, slopes)[0], (q, k, v), weights)
    for found, expected in zip(ours, truth, strict=True):
        assert_near(found, expected.cpu().double())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("meaning", "kind"), GRADIENTS, ids=str)
def test_gradients_of_packed_sequences(meaning, kind, device):
    lens = ([3, 0, 6, 1], [3, 2, 6, 4])
    q, k, v, cu_q, cu_k = packed(*lens, 4, 2, device=device)
    slopes, weights = slopes_of(kind, 4, 4, device), normal(10, 4, 16).double()
    options = {"alibi_slopes": slopes, **meaning.keywords}
    ours = gradients(
        lambda *x: flash_attn_varlen_func(*x, cu_q, cu_k, 6, 6, **options), (q, k, v), weights
    )
    truth = gradients(lambda *x: varlen_truth(*x, *lens, meaning, slopes)[0], (q, k, v), weights)
    for found, expected in zip(ours, truth, strict=True):
        assert_near(found, expected.cpu().double())


@pytest.mark.parametrize("device", DEVICES)
def test_deterministic_gradients_are_the_same_bits(device):
    q, k, v = inputs(70, 130, 4, 2, device=device)
    weights = normal(2, 70, 4, 16).double()

    def run():
        return gradients(
            lambda *x: flash_attn_func(*x, causal=True, deterministic=True), (q, k, v), weights
        )

    for once, again in zip(run(), run(), strict=True):
        assert torch.equal(once, again)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("causal", "window"), WINDOWS, ids=str)
def test_half_precision_and_whole_tiles(causal, window, dtype, device):
    q, k, v = inputs(150, 200, 4, 2, dim=64, device=device, dtype=dtype)
    meaning = Meaning(causal, tuple(10 * n for n in window))
    out, lse, _ = flash_attn_func(q, k, v, return_attn_probs=True, **meaning.keywords)
    truth = batch(q, k, v, meaning)
    assert_near(out, truth[0])
    assert_near(lse, truth[1], LSE_ALLOWANCE)


def test_stacked_tensors_are_the_same_as_apart():
    q, k, v = inputs(6, 6, 4, 4)
    options = {"causal": True, "window_size": (3, -1), "return_attn_probs": True}
    expected = flash_attn_func(q, k, v, **options)
    kv, qkv = torch.stack([k, v], dim=2), torch.stack([q, k, v], dim=2)
    for found in (
        flash_attn_kvpacked_func(q, kv, **options),
        flash_attn_qkvpacked_func(qkv, **options),
    ):
        assert all(map(torch.equal, found, expected))
    q, k, v, cu, _ = packed([2, 4], [2, 4], 4, 4)
    expected = flash_attn_varlen_func(q, k, v, cu, cu, 4, 4, **options)
    kv, qkv = torch.stack([k, v], dim=1), torch.stack([q, k, v], dim=1)
    for found in (
        flash_attn_varlen_kvpacked_func(q, kv, cu, cu, 4, 4, **options),
        flash_attn_varlen_qkvpacked_func(qkv, cu, 4, **options),
    ):
        assert all(map(torch.equal, found, expected))


def test_gradient_of_a_stacked_tensor():
    q, k, v = inputs(6, 6, 4, 4)
    weights = normal(2, 6, 4, 16).double()
    (found,) = gradients(flash_attn_qkvpacked_func, [torch.stack([q, k, v], dim=2)], weights)
    truth = gradients(lambda *x: batch(*x, Meaning())[0], (q, k, v), weights)
    assert_near(found, torch.stack(truth, dim=2).double())


def test_numbers_may_be_tensors_as_flash_attn_takes_them():
    q, k, v, cu, _ = packed([2, 4], [2, 4], 4, 4)
    window = torch.tensor([1, 0])
    found = flash_attn_varlen_func(
        q, k, v, cu, cu, torch.tensor(4), torch.tensor(4), window_size=window
    )
    assert_near(found, varlen_truth(q, k, v, [2, 4], [2, 4], Meaning(window=(1, 0)))[0])


def test_inside_of_a_compiled_function():
    q, k, v = inputs(6, 9, 4, 2)
    compiled = torch.compile(flash_attn_func, backend="aot_eager", fullgraph=True)
    for meaning in (Meaning(causal=True), Meaning(window=(2, 3))):
        assert_near(compiled(q, k, v, **meaning.keywords), batch(q, k, v, meaning)[0])


@pytest.mark.parametrize("window", [(-1, 0), (1, 2)], ids=str)
def test_packed_sequences_end_the_graph_of_a_compiled_function(window):
    q, k, v, cu_q, cu_k = packed([2, 4], [3, 4], 4, 2)

    def twice(q):
        return flash_attn_varlen_func(q, k, v, cu_q, cu_k, 4, 4, window_size=window) * 2

    expected, _ = varlen_truth(q, k, v, [2, 4], [3, 4], Meaning(window=window))
    assert_near(torch.compile(twice, backend="aot_eager")(q), expected * 2)


def test_the_signatures_are_those_of_flash_attn():
    shared = (
        "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, "
        "alibi_slopes=None, deterministic=False, return_attn_probs=False"
    )
    lengths = "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k"
    for function, expected in (
        (flash_attn_func, f"q, k, v, {shared}"),
        (flash_attn_kvpacked_func, f"q, kv, {shared}"),
        (flash_attn_qkvpacked_func, f"qkv, {shared}"),
        (flash_attn_varlen_func, f"q, k, v, {lengths}, {shared}, block_table=None"),
        (flash_attn_varlen_kvpacked_func, f"q, kv, {lengths}, {shared}"),
        (flash_attn_varlen_qkvpacked_func, f"qkv, cu_seqlens, max_seqlen, {shared}"),
    ):
        parameters = inspect.signature(function).parameters.values()
        told = ", ".join(str(p.replace(annotation=p.empty)) for p in parameters)
        assert told == expected


DENSE = [
    ({"dropout_p": 0.1}, "dropout_p must be 0, got 0.1"),
    ({"window_size": 3}, "window_size must be .left, right., -1 for all keys, got 3"),
    ({"window_size": (1, 2, 3)}, "window_size must be"),
    ({"window_size": (1.5, 0)}, "a number of window_size must be an integer, got 1.5"),
    ({"causal": 1}, "causal must be True or False, got 1"),
    ({"deterministic": None}, "deterministic must be True or False"),
    ({"return_attn_probs": "yes"}, "return_attn_probs .* must be True or False"),
    ({"softcap": None}, "softcap must be a number"),
    ({"softmax_scale": "0.1"}, "scale must be a number"),
    ({"alibi_slopes": torch.rand(3)}, "alibi_slopes must have shape .4. or .2, 4."),
    ({"q": normal(2, 6, 64)}, "q must be a floating-point tensor .batch, seqlen, heads, head_dim."),
    ({"q": normal(2, 6, 4, 16).int()}, "q must be a floating-point tensor"),
    ({"q": normal(3, 6, 4, 16)}, "q and k must share the batch, got 3 and 2"),
    ({"q": normal(2, 6, 3, 16)}, "the query heads must be a multiple of the key/value heads"),
    ({"q": normal(2, 6, 4, 8)}, "q and k must share head_dim, got 8 and 16"),
    ({"q": normal(2, 6, 4, 16).half()}, "q, k and v must have one dtype, got float16, float32"),
    ({"v": normal(2, 8, 2, 16)}, "k and v must share .batch, seqlen, heads., got .2, 9, 2, 16."),
]


@pytest.mark.parametrize(("wrong", "sentence"), DENSE)
def test_wrong_inputs_are_refused(wrong, sentence):
    q, k, v = inputs(6, 9, 4, 2)
    given = {"q": q, "k": k, "v": v, **wrong}
    with pytest.raises((TypeError, ValueError), match=sentence):
        flash_attn_func(given.pop("q"), given.pop("k"), given.pop("v"), **given)


VARLEN = [
    ({"cu_seqlens_q": torch.tensor([0, 3, 2]).int()}, "cu_seqlens_q must rise from 0, got .0, 3"),
    ({"cu_seqlens_q": torch.tensor([0, 3, 9]).int()}, "cu_seqlens_q must end at 5, the tokens of"),
    ({"cu_seqlens_q": torch.tensor([0.0, 3, 5])}, "cu_seqlens_q must be a int32 or int64 tensor"),
    ({"cu_seqlens_k": torch.tensor([1, 3, 7]).int()}, "cu_seqlens_k must rise from 0, got"),
    ({"cu_seqlens_k": torch.tensor([0, 7]).int()}, "one number more than sequences, got 3 and 2"),
    ({"max_seqlen_q": 2}, "max_seqlen_q must be at least the longest sequence, 3, got 2"),
    ({"max_seqlen_k": None}, "max_seqlen_k must be an integer, got None"),
    ({"alibi_slopes": torch.rand(3, 4)}, "alibi_slopes must have shape .heads. or .2, heads."),
    ({"q": normal(1, 5, 4, 16)}, "q must be a floating-point tensor .tokens, heads, head_dim."),
    ({"block_table": torch.zeros(2, 2).int()}, "k must be .* .pages, page_size, kv_heads"),
]


@pytest.mark.parametrize(("wrong", "sentence"), VARLEN)
def test_wrong_inputs_of_packed_sequences_are_refused(wrong, sentence):
    q, k, v, cu_q, cu_k = packed([3, 2], [4, 3], 4, 2)
    given = {"q": q, "k": k, "v": v, "cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}
    given |= {"max_seqlen_q": 3, "max_seqlen_k": 4, **wrong}
    with pytest.raises((TypeError, ValueError), match=sentence):
        flash_attn_varlen_func(**given)


def test_pages_that_do_not_hold_the_keys_are_refused():
    q, k, v, cu_q, cu_k = packed([3, 2], [4, 3], 4, 2)
    (k_pages, table), (v_pages, _) = (in_pages(x, [4, 3], 4) for x in (k, v))
    given = (q, k_pages, v_pages, cu_q, cu_k, 3, 4)
    with pytest.raises(ValueError, match="block_table has 0 pages of 4 keys a row"):
        flash_attn_varlen_func(*given, block_table=table[:, :0])
    with pytest.raises(ValueError, match="names page 99, but the pool has 4 pages"):
        flash_attn_varlen_func(*given, block_table=torch.full_like(table, 99))
    with pytest.raises(TypeError, match="block_table must be an int32 tensor .rows, pages."):
        flash_attn_varlen_func(*given, block_table=[[0]])
    with pytest.raises(ValueError, match="block_table must be int32 .2, 2."):
        flash_attn_varlen_func(*given, block_table=table.long())


@pytest.mark.parametrize("window", [(-1, -1), (1, 1)])
@pytest.mark.parametrize("pages", [False, True])
@pytest.mark.parametrize("sequences", [0, 2])
def test_no_tokens(sequences, pages, window):
    cu = torch.zeros(sequences + 1, dtype=torch.int32)
    q, k = normal(0, 4, 16), normal(*([2, 8] if pages else [0]), 2, 16)
    table = torch.zeros(sequences, 1, dtype=torch.int32) if pages else None
    out, lse, _ = flash_attn_varlen_func(
        q, k, k, cu, cu, 0, 0, window_size=window, return_attn_probs=True, block_table=table
    )
    assert out.shape == (0, 4, 16) and lse.shape == (4, 0)


def test_stacks_of_another_number_are_refused():
    with pytest.raises(TypeError, match="kv must be a tensor .batch, seqlen, 2, kv_heads"):
        flash_attn_kvpacked_func(normal(2, 6, 4, 16), normal(2, 6, 3, 4, 16))
    with pytest.raises(TypeError, match="qkv must be a floating-point tensor .tokens, 3, heads"):
        flash_attn_varlen_qkvpacked_func(normal(6, 4, 16), torch.tensor([0, 6]).int(), 6)


@pytest.mark.parametrize("device", DEVICES[1:])
def test_gradients_that_cannot_be_deterministic_are_refused_on_a_gpu(device):
    q, k, v = (x.double().requires_grad_() for x in inputs(6, 9, 4, 2, device=device))
    with pytest.raises(Unsupported, match="deterministic=True needs the gradients of .* triton"):
        flash_attn_func(q, k, v, deterministic=True)
