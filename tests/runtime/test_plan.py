"""Plans: caches to the byte, attention within 5 %, and what fits into an amount of memory."""

import subprocess
import sys
from dataclasses import asdict
from functools import cache
from itertools import cycle, product
from time import process_time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile
from transformers import MambaConfig

import saccade
from saccade.cache import (
    DenseCache,
    LateQuantizedCache,
    PagedCache,
    PagePool,
    QuantizedCache,
    QuantizedRing,
    RaggedCache,
    RingCache,
)
from saccade.compress import resolve_budget
from saccade.core import BadInput, Mask, Unsupported
from saccade.ops import attend, make_call
from saccade.ops.attention.cpu import binding
from saccade.ops.kv_write.hadamard import hadamard_transform
from saccade.ops.planning import PeakBytes, without_memory
from saccade.runtime import ContextParams
from saccade.runtime.compression import DECODE_ROOM
from saccade.runtime.layers import layer_cache
from saccade.runtime.memory import AttentionPeak, cache_bytes, chunks
from saccade.runtime.planned_cache import new_keys
from saccade.runtime.rollback import checkpoint
from saccade.sparse import BlockTopK, Quest
from tests.tiny_models import tiny_config, tiny_model

PARAMS = {
    "plain": {},
    "f32": {"type_k": "f32", "type_v": "f32"},
    "bf16": {"type_k": "bf16", "type_v": "bf16"},
    "int8": {"type_k": "int8", "type_v": "int8"},
    "int4": {"type_k": "int4", "type_v": "int4"},
    "int8 and int4": {"type_k": "int8", "type_v": "int4"},
    "fp8": {"type_k": "fp8", "type_v": "fp8"},
    "pages": {"page_size": 16},
    "in host memory": {"offload_kqv": False},
    "window": {"n_swa": 20},
    "window and sinks in f16": {"n_swa": 20, "n_sinks": 4, "type_k": "f16", "type_v": "f16"},
    "window with checkpoints": {"n_swa": 20, "ctx_checkpoints": 3},
    "int8 window": {"n_swa": 150, "n_sinks": 3, "type_k": "int8", "type_v": "int8"},
    "int4 window": {"n_swa": 130, "ctx_checkpoints": 2, "type_k": "int4", "type_v": "int4"},
    "compressed": {"kv_policy": "snapkv", "kv_budget": 0.25},
    "compressed to a number": {"kv_policy": "snapkv", "kv_budget": 40},
    "sparse": {"sparse": Quest(block=8)},
    "sparse in int8": {"sparse": BlockTopK(block=16), "type_k": "int8", "type_v": "int8"},
    "sparse in pages": {"sparse": Quest(block=24), "page_size": 16},
    "sparse and compressed": {"sparse": BlockTopK(), "kv_policy": "snapkv", "kv_budget": 0.25},
    "compressed int4": {"kv_policy": "snapkv", "kv_budget": 40, "type_k": "int4", "type_v": "int4"},
}
FAMILIES = ("llama", "mistral", "gemma3", "gpt_oss", "qwen2", "phi3")


@pytest.fixture(scope="module")
def models():
    """Each family's model, made once."""
    return cache(lambda family: tiny_model(tiny_config(family)))


# Layers of gemma3 are full and sliding: it sees all options, and each other family its share.
CASES = [("gemma3", name) for name in PARAMS]
CASES += zip(cycle(family for family in FAMILIES if family != "gemma3"), PARAMS, strict=False)
LENGTHS = [(1, 0, 7), (63, 3, 512), (200, 70, 7), (301, 0, 7), (301, 0, 512)]


@pytest.mark.parametrize(("family", "name"), CASES)
def test_caches_to_the_byte(models, family, name):
    """What is allocated by a context is what was planned from the config alone."""
    model = models(family)
    for prompt, written, n_batch in LENGTHS:
        params = ContextParams(n_batch=n_batch, **PARAMS[name])
        planned = saccade.plan(model.config, params, prompt + written, prompt=prompt)
        with saccade.Context(model, params) as ctx:
            ctx.append(torch.arange(prompt) % 120 + 3)
            before = ctx.cache_bytes
            ctx.compress()
            for token in range(written):
                ctx.append([token + 3])
            assert ctx.cache_bytes == planned.cache_bytes
            assert max(before, ctx.cache_bytes) == planned.most_cache_bytes


def test_ragged_caches_to_a_page_per_head():
    """How heads share a budget is known only after the prompt was read."""
    model = tiny_model(tiny_config("llama"))
    params = ContextParams(n_batch=100, kv_policy="ada_snapkv", kv_budget=0.25)
    planned = saccade.plan(model.config, params, 310, prompt=300)
    with saccade.Context(model, params) as ctx:
        ctx.append(torch.arange(300) % 120 + 3)
        assert ctx.cache_bytes == planned.most_cache_bytes
        ctx.compress()
        for token in range(10):
            ctx.append([token + 3])
        page = 16 * (2 * 16 * 4 + 4)  # keys, values and positions
        table = 4 * 2 * (300 // 16 + 1)
        spread = 4 * (2 * page + table)
        assert abs(ctx.cache_bytes - planned.cache_bytes) <= spread < ctx.cache_bytes
        assert ctx.cache_bytes < planned.most_cache_bytes / 2


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])  # full, sliding, both
@pytest.mark.parametrize("reserve", [100, 300, 2000])
def test_reserved_caches_to_the_byte(models, family, reserve):
    model = models(family)
    for name in ("plain", "int8", "window", "in host memory"):
        params = ContextParams(**PARAMS[name])
        with saccade.Context(model, params, reserve=reserve) as ctx:
            ctx.append(torch.arange(300) % 120 + 3)
            planned = saccade.plan(model.config, params, 300, reserve=reserve)
            assert ctx.cache_bytes == planned.cache_bytes


HUGE = {
    "plain": {},
    "disabled": {"flash_attn": "disabled"},
    "read at once": {"n_batch": 10**10},
    "scores of a chunk read at once": {"n_batch": 10**10, "flash_attn": "disabled"},
    "read one by one": {"n_batch": 1},
    **{name: PARAMS[name] for name in ("int8", "int4", "pages", "window with checkpoints")},
    **{name: PARAMS[name] for name in ("int8 window", "int4 window")},
    "a long int8 window": {"n_swa": 10**9, "type_k": "int8", "type_v": "int8"},
    "compressed": {"kv_policy": "snapkv", "kv_budget": 0.5},
    "ragged": {"kv_policy": "ada_snapkv", "kv_budget": 0.5},
    "a long window with checkpoints": {"n_swa": 10**9, "ctx_checkpoints": 9},
}


@pytest.mark.parametrize("name", HUGE)
def test_billions_of_tokens_take_seconds_of_processor_time(name):
    """Memory is linear to the sixteenth that caches grow."""
    params, config = ContextParams(**HUGE[name]), tiny_config("llama")
    start = process_time()
    small = saccade.plan(config, params, 10**6, prompt=5 * 10**5)
    huge = saccade.plan(config, params, 4 * 10**9, prompt=2 * 10**9)
    saccade.plan(config, params, 4 * 10**9)
    assert process_time() - start < 10
    if "window" not in name:
        assert abs(huge.cache_bytes / small.cache_bytes / 4000 - 1) < 0.07
    if "scores" in name:
        assert 0.9 < huge.attention_bytes / small.attention_bytes / 4000**2 < 1.1


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from([*PARAMS, "ragged"]),
    n_batch=st.sampled_from([1, 2, 7, 64, 200, 900]),
    prompt=st.integers(1, 500),
    written=st.sampled_from([0, 1, 5, 63, 130]),
    reserve=st.sampled_from([0, 0, 700, 5000]),
)
def test_joined_appends_take_the_bytes_of_single_ones(name, n_batch, prompt, written, reserve):
    """Against the real caches on meta tensors, appended to one by one."""
    options = PARAMS.get(name, {"kv_policy": "ada_snapkv", "kv_budget": 0.25})
    params = ContextParams(n_batch=n_batch, **options)
    facts = saccade.plan(tiny_config("gemma3"), n_ctx=9).facts
    ours = cache_bytes(facts, params, chunks(prompt, n_batch), [(1, written)], reserve=reserve)
    total = 0
    for own in facts.windows:
        cache = layer_cache(own, params, reserve=reserve)
        for size in [n_batch] * (prompt // n_batch) + [prompt % n_batch]:
            if size:
                cache.append(*new_keys(facts, size, torch.device("meta")))
            if size > 1:
                checkpoint([cache])
        kept = resolve_budget(params.kv_budget or 1.0, prompt)
        late = isinstance(cache, LateQuantizedCache)  # quantized whatever is kept
        if late or (kept < prompt and isinstance(cache, DenseCache)):
            cache.keep(torch.zeros(1, 2, kept, dtype=torch.int64, device="meta"), room=DECODE_ROOM)
        elif kept < prompt and isinstance(cache, RaggedCache):
            cache.keep_newest(kept)
        for _ in range(written):
            cache.append(*new_keys(facts, 1, torch.device("meta")))
        total += cache.nbytes
    assert ours == total


def checkpointed():
    """A ring that makes a checkpoint after every append."""
    cache = RingCache(window=50, checkpoints=2)
    append = cache.append

    def append_and_checkpoint(k, v):
        view = append(k, v)
        cache.checkpoint()
        return view

    cache.append = append_and_checkpoint
    return cache


CACHES = {
    "dense": DenseCache,
    "ring with checkpoints": checkpointed,
    "ragged": RaggedCache,
    "fp8": lambda: QuantizedCache(fp8=True),
    "dense in bf16": lambda: DenseCache(dtype=torch.bfloat16),
    "reserved": lambda: DenseCache(reserve=500),
    "ring": lambda: RingCache(window=50, sinks=4),
    "ring of chunks": lambda: RingCache(window=50, sinks=4, chunk=64),
    "int8": QuantizedCache,
    "int8 ring": lambda: QuantizedRing(window=50, sinks=4),
    "int4": lambda: QuantizedCache(bits_k=4, bits_v=4, group=32, recent=16, hadamard=False),
    "paged": PagedCache,
    "pool": lambda: PagedCache(PagePool(32)),
    "paged in small pages": lambda: PagedCache(page_size=16),
}


@pytest.mark.parametrize("name", CACHES)
@pytest.mark.parametrize("steps", [[1] * 90, [100, 100, 37, 1, 1], [700]])
def test_meta_tensors_take_the_same_bytes(name, steps):
    """`nbytes` on tensors without memory are those on real ones."""
    sizes = []
    for device in ("meta", "cpu"):
        cache = CACHES[name]()
        for step in steps:
            k = torch.zeros(2, 3, step, 32, device=device)
            cache.append(k, k)
        sizes.append(cache.nbytes)
    assert sizes[0] == sizes[1] > 0


def step(make, length, chunk, counter, dim=32, backend="auto", **options):
    """One step of attention over a cache of `length` tokens, inside `counter`."""
    cache = make()

    def new(heads, count):
        return torch.randn(1, heads, count, dim)

    if length > chunk:
        cache.append(new(2, length - chunk), new(2, length - chunk))
    q, k, v = new(6, chunk), new(2, chunk), new(2, chunk)
    with counter as found:
        view = cache.append(k, v)
        call = make_call(q, view, q_offset=view.shape[2] - chunk, **options)
        attend(call, backend=backend)
    return found


def allocated(found):
    """Most bytes that PyTorch's own allocator had given out at once, by its profiler.

    Right where nothing from before is freed meanwhile: caches here do not grow in the step.
    """
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


# What a thread has of its own differs by backend, not by storage.
THREADS = [("reserved", backend, 2) for backend in ("reference", "tiled", "sdpa")]
CACHED = ["reserved", "ring", "int8", "int4", "fp8", "pool"]
STORED = product(CACHED, ["reference", "tiled", "sdpa"])


@pytest.mark.parametrize(
    ("cache", "backend", "threads"), [*THREADS, *((*stored, 1) for stored in STORED)]
)
def test_attention_within_5_percent(cache, backend, threads):
    """Of what the allocator saw: scores, tiles, copies, masks, outputs and kernels' own buffers."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for length, chunk in [(450, 200), (300, 300), (500, 1)]:
            options = {"mask": Mask(window=50, sinks=4) if cache == "ring" else Mask()}
            options |= {"backend": backend}
            with without_memory():
                planned = step(CACHES[cache], length, chunk, PeakBytes(), **options).peak
            found = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            with torch.no_grad():
                measured = allocated(step(CACHES[cache], length, chunk, found, **options))
            assert abs(planned - measured) <= 0.05 * measured, (length, chunk, planned, measured)
    finally:
        torch.set_num_threads(before)


NATIVE = """
import sys, torch
from saccade.cache import DenseCache
from saccade.core import Mask
from tests.support.high_water import PeakMemory
from saccade.ops import attend, make_call
torch.set_num_threads(int(sys.argv[1]))
cache, q = DenseCache(reserve=1536), torch.randn(1, 32, 512, 128)
first, k = torch.randn(1, 8, 1024, 128), torch.randn(1, 8, 512, 128)
cache.append(first, first)
with torch.no_grad():
    attend(make_call(q[:, :, :1], cache.view(), mask=Mask()), backend="cpu")
    cache.append(k, k)
    peak = PeakMemory()
    peak.start()
    attend(make_call(q, cache.view(), mask=Mask()), backend="cpu")
    print(peak.bytes() or 0)
"""


@pytest.mark.skipif(not binding.BUILT, reason="built without the C++ kernels")
@pytest.mark.parametrize("threads", [1, 2])
def test_native_attention_within_5_percent(threads):
    """Of the high-water mark of a fresh process, whose kernels have allocated nothing yet."""
    call = [sys.executable, "-c", NATIVE, str(threads)]
    measured = int(subprocess.run(call, capture_output=True, text=True, check=True).stdout)
    if not measured:
        pytest.skip("this system does not report the peak memory of a process")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with without_memory(), PeakBytes() as counter:
            q, k = torch.empty(1, 32, 512, 128), torch.empty(1, 8, 1536, 128)
            start = counter.peak
            saccade.attention(q, k, k, backend="cpu")
    finally:
        torch.set_num_threads(before)
    planned = counter.peak - start
    assert abs(planned - measured) <= 0.05 * measured, (planned, measured)


def test_plans_leave_no_fake_tensors():
    """A Hadamard matrix cached during a plan would break every quantized cache after it."""
    AttentionPeak(saccade.plan(tiny_config("llama")).facts, ContextParams(**PARAMS["int8"])).at(99)
    assert type(hadamard_transform(torch.randn(2, 16))) is torch.Tensor
    assert torch.isfinite(hadamard_transform(torch.randn(2, 16))).all()


def test_plans_of_model_config_and_files_are_equal(tmp_path):
    from tests.hf.gguf_files import write_gguf

    model = tiny_model(tiny_config("llama", vocab_size=300))
    model.save_pretrained(tmp_path / "folder")
    write_gguf(model, tmp_path / "tiny.gguf", "llama")
    described = [
        model, model.config, model.config.to_dict(), tmp_path / "folder",
        str(tmp_path / "tiny.gguf"), saccade.load_model(tmp_path / "folder"),
    ]  # fmt: skip
    plans = [asdict(saccade.plan(one, n_ctx=200)) for one in described]
    for planned in plans:
        planned["facts"]["name"] = ""
        assert planned == plans[0]
    assert plans[0]["weights_bytes"] == sum(p.nbytes for p in model.parameters())


def test_planned_weights_count_tied_ones_once():
    config = tiny_config("llama", tie_word_embeddings=True)
    planned = saccade.plan(config, dtype=torch.bfloat16).weights_bytes
    assert planned == sum(p.nbytes for p in tiny_model(config).parameters()) // 2


def test_a_readable_table():
    text = str(saccade.plan(tiny_config("llama"), n_ctx=1000))
    assert "1,000 tokens (trained for 512)" in text
    assert "cache                 1.00 MiB, 1.02 KiB a token" in text


def test_refusals():
    config = tiny_config("llama")
    for options in (
        {"n_ctx": 10, "prompt": 11}, {"n_ctx": 0}, {"n_ctx": -1}, {"n_ctx": 2.5}, {"n_ctx": "9"},
        {"n_ctx": 10, "prompt": 0}, {"n_ctx": 10, "reserve": -1}, {"n_ctx": True},
    ):  # fmt: skip
        with pytest.raises(BadInput, match="a plan needs whole numbers with n_ctx >= 1"):
            saccade.plan(config, **options)
    for n_ctx in (2**63, 10**400, 10**18):
        with pytest.raises(BadInput, match="a plan counts up to [0-9]+ tokens for this model"):
            saccade.plan(config, n_ctx=n_ctx)
    with pytest.raises(BadInput, match="a plan counts up to [0-9]+ tokens for this model"):
        saccade.plan(config, n_ctx=9, reserve=2**62)
    with pytest.raises(BadInput, match="a plan counts up to 256 checkpoints"):
        saccade.plan(config, ContextParams(n_swa=8, ctx_checkpoints=10**9), n_ctx=999)
    with pytest.raises(BadInput, match="expected what a config.json holds"):
        saccade.plan({"model_type": "no such thing"})
    with pytest.raises(BadInput, match="no model at 'nowhere'"):
        saccade.plan("nowhere")
    with pytest.raises(Unsupported, match="mamba has 2 layers and none with attention"):
        saccade.plan(MambaConfig(vocab_size=128, hidden_size=32, num_hidden_layers=2))
    for wrong in ({"num_attention_heads": 0}, {"num_hidden_layers": -1}, {"vocab_size": 0}):
        with pytest.raises(BadInput, match=r"expected a whole number from 1 to|no model is"):
            saccade.plan({"model_type": "llama", **wrong})
