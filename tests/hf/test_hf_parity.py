"""Equality with transformers' eager attention, on every path by which a mask can arrive."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel, StaticCache

from saccade.core import Unsupported
from saccade.hf import KEY, attach
from saccade.runtime.params import ContextParams

CHUNKS = ((0, 6), (6, 14), (14, 15), (15, 24))
TOLERANCE = 1e-5

CACHES: dict[str, Callable[[PreTrainedModel], Any]] = {
    "dynamic": lambda model: DynamicCache(config=model.config),
    "dynamic without config": lambda model: DynamicCache(),
    "static": lambda model: StaticCache(config=model.config, max_cache_len=40),
}


def close(ours: Tensor, theirs: Tensor, where: Tensor | None = None) -> None:
    if where is not None:
        ours, theirs = ours[where.bool()], theirs[where.bool()]
    torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=TOLERANCE)


@torch.no_grad()
def in_chunks(model: PreTrainedModel, ids: Tensor, mask: Tensor | None, cache: Any) -> Tensor:
    parts = []
    for start, stop in CHUNKS:
        seen = None if mask is None else mask[:, :stop]
        output = model(ids[:, start:stop], attention_mask=seen, past_key_values=cache)
        parts.append(output.logits)
    return torch.cat(parts, 1)


@torch.no_grad()
def test_prefill(pair, ids):
    close(pair.ours(ids).logits, pair.eager(ids).logits)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_prefill(pair, ids, padded, side):
    mask = padded if side == "left" else padded.flip(1)
    ours, theirs = (m(ids, attention_mask=mask).logits for m in (pair.ours, pair.eager))
    close(ours, theirs, mask)


@torch.no_grad()
def test_padding_changes_nothing_for_a_row(pair, ids, padded):
    if pair.name == "deepseek_v3":
        pytest.skip("experts are routed by token, rows of a batch differ in rounding")
    positions = (padded.cumsum(1) - 1).clamp_min(0)
    together = pair.ours(ids, attention_mask=padded, position_ids=positions).logits
    close(together[0, 5:], pair.ours(ids[:1, 5:]).logits[0])


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("padding", [False, True])
def test_chunked_prefill_and_decode(pair, ids, padded, kind, padding):
    mask = padded if padding else None
    ours, theirs = (
        in_chunks(model, ids, mask, CACHES[kind](model)) for model in (pair.ours, pair.eager)
    )
    close(ours, theirs, mask)


@torch.no_grad()
def test_packed_sequences_do_not_attend_to_each_other(pair, ids):
    lengths = (10, 8, 6)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = pair.ours(ids[:1], position_ids=positions, use_cache=False).logits
    alone = [pair.eager(part).logits for part in ids[:1].split(lengths, dim=1)]
    close(packed, torch.cat(alone, 1))


@torch.no_grad()
def test_cumulative_lengths_of_packed_sequences(ids):
    """What DataCollatorWithFlattening passes; the model itself builds no packed mask from it."""
    from tests.hf.conftest import Pair

    pair, edges = Pair("llama"), torch.tensor([0, 10, 18, 24], dtype=torch.int32)
    positions = torch.cat([torch.arange(n) for n in (10, 8, 6)])[None]
    packed = pair.ours(
        ids[:1], position_ids=positions, cu_seq_lens_q=edges, cu_seq_lens_k=edges, use_cache=False
    ).logits
    alone = [pair.eager(part).logits for part in ids[:1].split((10, 8, 6), dim=1)]
    close(packed, torch.cat(alone, 1))


@torch.no_grad()
@pytest.mark.parametrize("form", ["bool", "-inf", "min"])
def test_4d_masks(pair, ids, form):
    visible = torch.rand(2, 1, 24, 24, generator=torch.Generator().manual_seed(1)) > 0.4
    visible = visible.tril() | torch.eye(24, dtype=torch.bool)
    low = torch.finfo(torch.float32).min
    additive = torch.zeros(visible.shape).masked_fill(~visible, low)
    theirs = pair.eager(ids, attention_mask=additive).logits
    mask = {"bool": visible, "min": additive, "-inf": torch.zeros_like(additive)}[form]
    if form == "-inf":
        mask = mask.masked_fill(~visible, -torch.inf)
    close(pair.ours(ids, attention_mask=mask).logits, theirs)


def test_biased_4d_masks_are_refused(ids):
    from tests.hf.conftest import Pair

    with pytest.raises(Unsupported, match=r"may hold only 0 and -inf"):
        Pair("llama").ours(ids, attention_mask=torch.randn(2, 1, 24, 24))


GENERATE = {
    "greedy": {"do_sample": False},
    "greedy, padded": {"do_sample": False},
    "static, padded": {"do_sample": False, "cache_implementation": "static"},
    "beams, padded": {"do_sample": False, "num_beams": 3},
    "sampling, padded": {"do_sample": True, "top_k": 20},
    "chunked prefill, padded": {"do_sample": False, "prefill_chunk_size": 7},
    "chunked prefill": {"do_sample": False, "prefill_chunk_size": 7},
    "two answers": {"do_sample": True, "num_return_sequences": 2},
}


@pytest.mark.parametrize("how", GENERATE)
def test_generate(pair, ids, padded, how):
    mask = padded if "padded" in how else torch.ones_like(ids)
    texts = []
    for model in (pair.ours, pair.eager):
        torch.manual_seed(0)
        texts.append(model.generate(ids, attention_mask=mask, max_new_tokens=4, **GENERATE[how]))
    assert torch.equal(*texts)


def test_gradients(pair, ids, padded):
    labels = ids.masked_fill(~padded.bool(), -100)
    labels[
        0, 5
    ] = -100  # its prediction comes from a pad, which in transformers attends to everything
    grads = []
    for model in (pair.ours, pair.eager):
        model.zero_grad()
        model(ids, attention_mask=padded, labels=labels).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
    for name, grad in grads[1].items():
        torch.testing.assert_close(grads[0][name], grad, atol=1e-5, rtol=1e-3)


@torch.no_grad()
def test_from_pretrained(tmp_path, pair, ids):
    pair.eager.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=KEY)
    assert loaded.config._attn_implementation == KEY
    close(loaded(ids).logits, pair.eager(ids).logits)


@torch.no_grad()
def test_bidirectional_decoder(ids, padded):
    from tests.tiny_models import tiny_config, tiny_model

    models = [tiny_model(tiny_config("llama", is_causal=False), i) for i in (KEY, "eager")]
    ours, theirs = (m(ids, use_cache=False).logits for m in models)
    close(ours, theirs)
    ours, theirs = (m(ids, attention_mask=padded, use_cache=False).logits for m in models)
    close(ours, theirs, padded)


@pytest.mark.parametrize("backend", ["reference", "tiled"])
def test_backends(pair, ids, padded, backend):
    with torch.no_grad(), attach(pair.ours, ContextParams(backend=backend)):
        ours = pair.ours(ids, attention_mask=padded).logits
    with torch.no_grad():
        close(ours, pair.eager(ids, attention_mask=padded).logits, padded)


def test_dropout_is_refused(ids):
    from tests.tiny_models import tiny_config, tiny_model

    model = tiny_model(tiny_config("llama", attention_dropout=0.1), KEY).train()
    with pytest.raises(Unsupported, match=r"no dropout on attention weights, got dropout=0\.1"):
        model(ids)
