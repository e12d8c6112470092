"""Patterns for prompts in a model: chunks and whole prompts, padded batches, dense steps."""

import pytest
import torch

import saccade
from saccade.hf import attach
from saccade.runtime import ContextParams
from saccade.runtime.step import captures
from saccade.sparse import TriangleMix, VerticalSlash, XAttention
from tests.tiny_models import tiny_config, tiny_model

TEXT = torch.arange(200) * 37 % 96 + 3
PATTERNS = {
    "triangle": TriangleMix(block=16, window_blocks=1, dense_rows=20, dense_layers=1),
    "xattention": XAttention(block=16, stride=4, p=0.5),
}
STORED = {
    "dense": {},
    "pages": {"page_size": 16},
    "int8": {"type_k": "int8", "type_v": "int8"},
}


@pytest.fixture(scope="module")
def llama():
    return tiny_model(tiny_config("llama"))


def read(model, steps=8, **options):
    """Logits behind a prompt and of steps behind it."""
    with saccade.Context(model, ContextParams(**options)) as ctx:
        found = [ctx.logits(ctx.append(TEXT[:-steps], wanted=60))]
        found += [ctx.logits(ctx.append(token[None])) for token in TEXT[-steps:]]
    return torch.cat(found)


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("name", PATTERNS)
def test_chunks_of_a_prompt_give_what_the_whole_gives(llama, name, stored):
    options = {"sparse": PATTERNS[name], **STORED[stored]}
    whole, parts = read(llama, n_batch=512, **options), read(llama, n_batch=64, **options)
    bound = (
        0.05 if stored == "int8" else 1e-4
    )  # a chunk's own tokens are read before they are rounded
    torch.testing.assert_close(parts, whole, atol=bound, rtol=bound)
    assert not torch.allclose(whole, read(llama, **STORED[stored]), atol=1e-3)


@pytest.mark.parametrize("pattern", [VerticalSlash(block=8, columns=99), XAttention(p=1)], ids=str)
def test_patterns_that_read_everything_change_nothing(llama, pattern):
    assert torch.equal(read(llama, sparse=pattern), read(llama))


def test_steps_are_dense(llama):
    """Behind a prompt that was read densely, steps under a pattern are the dense ones."""
    params = ContextParams(sparse=PATTERNS["xattention"])
    assert captures(params)
    with saccade.Context(llama) as dense, saccade.Context(llama, params) as sparse:
        found = []
        for ctx in (dense, sparse):
            for part in TEXT[:90].split(15):  # fewer than a pattern selects for
                ctx.append(part)
            found.append(torch.cat([ctx.logits(ctx.append(token[None])) for token in TEXT[90:100]]))
    assert torch.equal(*found)


@torch.no_grad()
@pytest.mark.parametrize("name", PATTERNS)
def test_a_padded_row_is_computed_as_it_is_alone(llama, name):
    ids, room = TEXT[:128][None], 32
    padded = torch.cat((torch.full((1, room), 1), ids), 1)
    batch = torch.cat((TEXT[: 128 + room].flip(0)[None], padded))
    mask = torch.ones_like(batch)
    mask[1, :room] = 0
    with attach(llama, ContextParams(sparse=PATTERNS[name])):
        alone = llama(ids).logits
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        found = llama(batch, attention_mask=mask, position_ids=positions).logits[1:, room:]
    torch.testing.assert_close(found, alone, atol=1e-4, rtol=1e-4)
