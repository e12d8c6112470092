"""flash_attn_with_kvcache: steps over a cache of the caller, against the formulas in float64."""

import inspect

import pytest
import torch

from saccade.core import Unsupported
from saccade.flash_attn_interface import flash_attn_with_kvcache
from tests.support.flash_attn import DEVICES, Meaning, assert_near, batch, rotated
from tests.support.random_inputs import normal
from tests.support.tolerance import LSE_ALLOWANCE

ROWS, HEADS, KV_HEADS, DIM, CAPACITY = 3, 4, 2, 32, 24
MEANINGS = [
    Meaning(),
    Meaning(causal=True),
    Meaning(causal=True, window=(4, 0), softcap=2.0),
    Meaning(window=(3, 2)),
    Meaning(window=(2, -1)),
]


def tensor(*numbers, device="cpu"):
    return torch.tensor(numbers, dtype=torch.int32, device=device)


class Storage:
    """A cache of one of three kinds, and where each row of q lies in it."""

    def __init__(self, kind, device="cpu", dtype=torch.float32, size=8):
        self.kind, self.device = kind, device
        rows = 5 if kind == "rows" else ROWS
        shape = (rows, CAPACITY, KV_HEADS, DIM)
        if kind == "pages":
            shape = (2 * ROWS * CAPACITY // size, size, KV_HEADS, DIM)
        self.k, self.v = (normal(*shape, device=device, dtype=dtype) for _ in range(2))
        self.options = {}
        if kind == "rows":
            self.options["cache_batch_idx"] = tensor(4, 0, 2, device=device)
        if kind == "pages":
            order = torch.randperm(len(self.k), device=device).int()
            self.options["block_table"] = order[: ROWS * CAPACITY // size].view(ROWS, -1)

    def keys(self, x):
        """A cache's keys or values as `[ROWS, CAPACITY, KV_HEADS, DIM]`, copied."""
        if self.kind == "dense":
            return x.clone()
        if self.kind == "rows":
            return x[self.options["cache_batch_idx"].long()].clone()
        return x[self.options["block_table"].long()].flatten(1, 2).clone()


KINDS = ["dense", "rows", "pages"]


def written(keys, new, lens):
    for row, (length, tokens) in enumerate(zip(lens, new, strict=True)):
        keys[row, length : length + len(tokens)] = tokens
    return keys


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("leftpad", [None, (2, 0, 7)], ids=str)
@pytest.mark.parametrize("slopes", [None, (HEADS,), (ROWS, HEADS)], ids=str)
@pytest.mark.parametrize("q_len", [1, 5])
@pytest.mark.parametrize("meaning", MEANINGS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_reading(kind, meaning, q_len, slopes, leftpad, device):
    storage, lens = Storage(kind, device), [9, 3, CAPACITY]
    q = normal(ROWS, q_len, HEADS, DIM, device=device)
    slopes = None if slopes is None else torch.rand(slopes, device=device)
    out, lse = flash_attn_with_kvcache(
        q,
        storage.k,
        storage.v,
        cache_seqlens=tensor(*lens, device=device),
        cache_leftpad=None if leftpad is None else tensor(*leftpad, device=device),
        alibi_slopes=slopes,
        return_softmax_lse=True,
        **storage.options,
        **meaning.keywords,
    )
    keys = storage.keys(storage.k), storage.keys(storage.v)
    truth = batch(q, *keys, meaning, slopes, lens, leftpad)
    assert_near(out, truth[0])
    assert_near(lse, truth[1], LSE_ALLOWANCE)
    assert out.is_contiguous()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("rotary_dim", [0, 16, 32])
@pytest.mark.parametrize(("q_len", "count"), [(1, 1), (4, 4), (5, 2), (2, 6)])
@pytest.mark.parametrize("meaning", MEANINGS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_appending(kind, meaning, q_len, count, rotary_dim, interleaved, device):
    storage, lens = Storage(kind, device), [9, 0, CAPACITY - 6]
    q = normal(ROWS, q_len, HEADS, DIM, device=device)
    k, v = (normal(ROWS, count, KV_HEADS, DIM, device=device) for _ in range(2))
    options, q_turned, k_turned = {}, q, k
    if rotary_dim:
        angles = torch.rand(CAPACITY, rotary_dim // 2, device=device) * 6
        cos, sin = angles.cos(), angles.sin()
        options = {"rotary_cos": cos, "rotary_sin": sin, "rotary_interleaved": interleaved}
        local = meaning.causal or meaning.window != (-1, -1)
        q_turned, k_turned = (
            torch.stack(
                [
                    rotated(row, cos, sin, [n + i * step for i in range(len(row))], interleaved)
                    for row, n in zip(x, lens, strict=True)
                ]
            )
            for x, step in ((q, int(local)), (k, 1))
        )
    before = storage.keys(storage.k).cpu().double(), storage.keys(storage.v)
    out = flash_attn_with_kvcache(
        q,
        storage.k,
        storage.v,
        k,
        v,
        cache_seqlens=tensor(*lens, device=device),
        **storage.options,
        **options,
        **meaning.keywords,
    )
    keys, values = written(before[0], k_turned, lens), written(before[1], v, lens)
    assert_near(storage.keys(storage.k), keys)
    assert torch.equal(storage.keys(storage.v), values)
    expected = batch(q_turned, keys, values, meaning, None, [n + count for n in lens])
    assert_near(out, expected[0])


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_else_of_the_cache_is_written(kind):
    storage = Storage(kind)
    before = storage.k.clone()
    q, k = normal(ROWS, 1, HEADS, DIM), normal(ROWS, 2, KV_HEADS, DIM)
    flash_attn_with_kvcache(
        q, storage.k, storage.v, k, k, cache_seqlens=tensor(1, 2, 3), **storage.options
    )
    changed = (storage.k != before).flatten(2).any(-1)
    assert int(changed.sum()) == ROWS * 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lens", [5, None], ids=str)
def test_one_length_for_all_rows(kind, lens):
    storage, meaning = Storage(kind), Meaning(causal=True)
    q = normal(ROWS, 3, HEADS, DIM)
    out = flash_attn_with_kvcache(
        q, storage.k, storage.v, cache_seqlens=lens, causal=True, **storage.options
    )
    keys = storage.keys(storage.k), storage.keys(storage.v)
    assert_near(out, batch(q, *keys, meaning, lens=[lens or CAPACITY] * ROWS)[0])


def test_steps_of_decoding_are_the_whole_at_once():
    tokens = 6
    q = normal(ROWS, tokens, HEADS, DIM)
    k, v = (normal(ROWS, tokens, KV_HEADS, DIM) for _ in range(2))
    cache = torch.full((ROWS, CAPACITY, KV_HEADS, DIM), torch.nan)
    k_cache, v_cache = cache.clone(), cache.clone()
    parts = [
        flash_attn_with_kvcache(
            q[:, i : i + 1],
            k_cache,
            v_cache,
            k[:, i : i + 1],
            v[:, i : i + 1],
            cache_seqlens=i,
            causal=True,
        )
        for i in range(tokens)
    ]
    assert_near(torch.cat(parts, dim=1), batch(q, k, v, Meaning(causal=True))[0])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision(kind, dtype, device):
    storage, lens = Storage(kind, device, dtype, size=4), [9, 3, CAPACITY - 1]
    q, k, v = (normal(ROWS, 1, h, DIM, device=device, dtype=dtype) for h in (HEADS, 2, 2))
    keys = [written(storage.keys(x), new, lens) for x, new in ((storage.k, k), (storage.v, v))]
    out = flash_attn_with_kvcache(
        q,
        storage.k,
        storage.v,
        k,
        v,
        cache_seqlens=tensor(*lens, device=device),
        causal=True,
        num_splits=3,
        **storage.options,
    )
    assert out.dtype == dtype
    assert_near(out, batch(q, *keys, Meaning(causal=True), lens=[n + 1 for n in lens])[0])


@pytest.mark.parametrize("device", DEVICES[1:])
@pytest.mark.parametrize("kind", KINDS)
def test_a_captured_step_reads_lengths_when_it_runs(kind, device):
    storage, lens = Storage(kind, device, torch.bfloat16, size=4), tensor(4, 1, 9, device=device)
    q, k, v = (normal(ROWS, 1, h, DIM, device=device, dtype=torch.bfloat16) for h in (HEADS, 2, 2))

    def step():
        return flash_attn_with_kvcache(
            q, storage.k, storage.v, k, v, cache_seqlens=lens, causal=True, **storage.options
        )

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    lens += 5
    graph.replay()
    keys = [storage.keys(storage.k), storage.keys(storage.v)]
    assert_near(out, batch(q, *keys, Meaning(causal=True), lens=[10, 7, 15])[0])


def test_a_step_ends_the_graph_of_a_compiled_function():
    storage, lens = Storage("pages"), tensor(9, 3, 20)
    q, k, v = (normal(ROWS, 1, heads, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))
    keys = [
        written(storage.keys(x), new, lens.tolist()) for x, new in ((storage.k, k), (storage.v, v))
    ]

    def step(q):
        given = {"cache_seqlens": lens, "causal": True, **storage.options}
        return flash_attn_with_kvcache(q, storage.k, storage.v, k, v, **given) * 2

    out = torch.compile(step, backend="aot_eager")(q)
    expected = batch(q, *keys, Meaning(causal=True), lens=[10, 4, 21])
    assert_near(out, expected[0] * 2)
    assert torch.equal(storage.keys(storage.k), keys[0])


def test_there_are_no_gradients():
    storage, q = Storage("dense"), normal(ROWS, 1, HEADS, DIM).requires_grad_()
    assert not flash_attn_with_kvcache(q, storage.k, storage.v).requires_grad


def test_the_signature_is_that_of_flash_attn():
    parameters = inspect.signature(flash_attn_with_kvcache).parameters.values()
    assert ", ".join(str(p.replace(annotation=p.empty)) for p in parameters) == (
        "q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, "
        "cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None, block_table=None, "
        "softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, "
        "rotary_interleaved=True, alibi_slopes=None, num_splits=0, return_softmax_lse=False"
    )


NEW = {"k": normal(ROWS, 2, KV_HEADS, DIM), "v": normal(ROWS, 2, KV_HEADS, DIM)}
TABLES = {"rotary_cos": torch.rand(CAPACITY, 8), "rotary_sin": torch.rand(CAPACITY, 8)}
WRONG = [
    ("dense", {"k": NEW["k"]}, "k and v must be given together"),
    ("dense", NEW, "k and v need cache_seqlens"),
    ("dense", {**NEW, "cache_seqlens": CAPACITY - 1}, "cache_seqlens of 23 and 2 new keys are mor"),
    (
        "dense",
        {**NEW, "cache_seqlens": tensor(0, 23, 1)},
        "more than the 24 keys that a row of the",
    ),
    ("pages", {**NEW, "cache_seqlens": tensor(0, 23, 1)}, "24 keys that a row of block_table hold"),
    ("dense", {"cache_seqlens": tensor(0, 25, 1)}, "cache_seqlens must be 0 to 24, got 25"),
    ("dense", {"cache_seqlens": tensor(0, -1, 1)}, "cache_seqlens must be 0 to 24, got -1"),
    ("dense", {"cache_seqlens": tensor(0, 1)}, "cache_seqlens must be int32 or int64 .3."),
    ("dense", {"cache_seqlens": 2.0}, "cache_seqlens must be an integer"),
    ("dense", {"cache_batch_idx": tensor(0, 1, 3)}, "cache_batch_idx must be 0 to 2, got 3"),
    ("dense", {"cache_batch_idx": tensor(0, 1)}, "cache_batch_idx must be int32 or int64 .3."),
    ("pages", {"cache_batch_idx": tensor(0, 1, 2)}, "cannot be combined with block_table"),
    ("dense", {"cache_leftpad": tensor(0, 1, 30)}, "cache_leftpad must be 0 to 24, got 30"),
    ("dense", {"cache_leftpad": [0, 1, 2]}, "cache_leftpad must be int32 or int64"),
    ("dense", TABLES, "rotary_cos and rotary_sin need k and v"),
    ("dense", {**NEW, "cache_seqlens": 1, "rotary_cos": TABLES["rotary_cos"]}, "given together"),
    ("dense", {**NEW, "cache_seqlens": 1, "rotary_interleaved": 1}, "rotary_interleaved must be T"),
    (
        "dense",
        {**NEW, "cache_seqlens": 9, "rotary_cos": torch.rand(9, 8), "rotary_sin": torch.rand(9, 8)},
        "a position of rotary_cos must be 0 to 8, got 9",
    ),
    (
        "dense",
        {**NEW, "cache_seqlens": 1, "k": NEW["k"].half()},
        "k must have the dtype of the cache, float32",
    ),
    ("dense", {**NEW, "cache_seqlens": 1, "v": NEW["v"][:2]}, "v must be .3, 2, 2, 32. to fit the"),
    ("dense", {**NEW, "cache_seqlens": 1, "alibi_slopes": torch.rand(3)}, "alibi_slopes must have"),
    ("dense", {**NEW, "cache_seqlens": 1, "cache_leftpad": tensor(0, 1, 30)}, "cache_leftpad must"),
    ("dense", {"num_splits": -1}, "num_splits must be at least 0, got -1"),
    ("dense", {"num_splits": None}, "num_splits must be an integer"),
    ("dense", {"return_softmax_lse": 1}, "return_softmax_lse must be True or False"),
    ("dense", {"q": normal(5, 1, HEADS, DIM)}, "k_cache must have a row for each of the 5 of q"),
    ("dense", {"v_cache": normal(3, 9, 2, DIM)}, "k_cache and v_cache must share .batch, seqlen"),
    ("pages", {"block_table": tensor(0, 1, 2)}, "block_table must be an int32 tensor .rows, pages"),
]


@pytest.mark.parametrize(("kind", "wrong", "sentence"), WRONG)
def test_wrong_inputs_are_refused_before_the_cache_is_written(kind, wrong, sentence):
    storage = Storage(kind)
    given = {"q": normal(ROWS, 1, HEADS, DIM), "k_cache": storage.k, "v_cache": storage.v}
    before = storage.k.clone()
    with pytest.raises((TypeError, ValueError, Unsupported), match=sentence):
        flash_attn_with_kvcache(**{**given, **storage.options, **wrong})
    assert torch.equal(storage.k, before)
