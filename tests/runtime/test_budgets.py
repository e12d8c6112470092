"""Budgets in bytes: what caches hold is counted here, tensor by tensor."""

from functools import cache

import pytest
import torch

import saccade
from saccade.compress import POLICIES
from saccade.core import BadInput
from saccade.runtime import ContextParams
from saccade.runtime.no_effect import without_effect
from saccade.sparse import Quest
from tests.tiny_models import tiny_config, tiny_model

PROMPT = torch.arange(440) * 37 % 113 + 3


@pytest.fixture(scope="module")
def models():
    return cache(lambda family: tiny_model(tiny_config(family)))


def tensors_of(thing, seen):
    """Bytes by address of every tensor that an object holds, in attributes and containers."""
    if isinstance(thing, torch.Tensor):
        return {thing.data_ptr(): thing.element_size() * thing.numel()}
    if thing is None or isinstance(thing, type | str | int) or callable(thing) or id(thing) in seen:
        return {}
    seen.append(id(thing))
    if isinstance(thing, dict | list | tuple):
        parts = list(thing.values() if isinstance(thing, dict) else thing)
    else:
        slots = [name for kind in type(thing).__mro__ for name in getattr(kind, "__slots__", ())]
        parts = [getattr(thing, name, None) for name in (*slots, *getattr(thing, "__dict__", ()))]
    return {at: size for part in parts for at, size in tensors_of(part, seen).items()}


def held(stores):
    return sum(sum(tensors_of(store, []).values()) for store in stores)


LLAMA = {None: (155_001, 250_000), "int8": (100_000, 140_001), "int4": (70_001, 95_000)}
CASES = [(name, None, "llama", LLAMA[None]) for name in POLICIES]
CASES += [
    (name, kind, "llama", LLAMA[kind])
    for name in ("snapkv", "pyramidkv")
    for kind in ("int8", "int4")
]
CASES += [(name, None, "gemma3", (45_000, 80_001)) for name in ("pyramidkv", "kvzip")]


@pytest.mark.parametrize(("name", "stored", "family", "budgets"), CASES)
def test_caches_take_at_most_their_bytes_and_most_of_them(models, name, stored, family, budgets):
    for budget in budgets:
        params = ContextParams(
            kv_policy=name, kv_budget=saccade.Bytes(budget), type_k=stored, type_v=stored
        )
        with saccade.Context(models(family), params, check="off") as ctx:
            ctx.append(PROMPT)
            assert held(ctx.cache.stores) > budget
            ctx.compress()
            assert budget - spare(stored, budget) < held(ctx.cache.stores) <= budget


def spare(stored, budget):
    """What may be left: half pages and page tables; in 4 layers a group and 72 slots in 16 bits."""
    key = {"int8": 2 * (16 + 16 + 6), "int4": 2 * (8 + 8 + 6)}
    return 0.2 * budget if stored is None else 4 * (64 * key[stored] + 72 * 2 * 2 * 16 * 2)


def test_no_more_keys_fit(models):
    """4 layers of 2 heads of 16 float32 channels, K and V, and 64 slots for what follows."""
    for name, kept in (("tova", 155_001 // 1024 - 64), ("uniform_kvzip", 155_001 // 1024 - 64)):
        params = ContextParams(kv_policy=name, kv_budget=saccade.Bytes(155_001))
        with saccade.Context(models("llama"), params, check="off") as ctx:
            assert ctx.params == ContextParams(kv_policy=name, kv_budget=kept)


@pytest.mark.parametrize(
    ("name", "stored"), [("snapkv", None), ("ada_snapkv", None), ("snapkv", "int4")]
)
def test_bytes_hold_from_one_compression_to_the_next(models, name, stored):
    budget = LLAMA[stored][0]
    params = ContextParams(
        kv_policy=name, kv_budget=saccade.Bytes(budget), kv_every=30, n_batch=32,
        type_k=stored, type_v=stored,
    )  # fmt: skip
    with saccade.Context(models("llama"), params, check="off") as ctx:
        stream = ctx.stream(PROMPT, n_predict=64)
        sizes = [held(ctx.cache.stores) for _ in stream]
        assert len(sizes) == 64 and 0.75 * budget < max(sizes) <= budget


@pytest.mark.parametrize("name", ["snapkv", "ada_snapkv"])
def test_rows_of_generate_share_the_bytes(models, name):
    """Two rows, one of them padded, whose caches are ragged under every policy."""
    model, budget = models("llama"), 300_000
    tokens, mask = (
        torch.stack([PROMPT, PROMPT.flip(0)]),
        torch.ones(2, len(PROMPT), dtype=torch.long),
    )
    mask[0, :40] = 0
    params = ContextParams(kv_policy=name, kv_budget=saccade.Bytes(budget))
    with saccade.attach(model, params):
        out = model.generate(
            tokens, attention_mask=mask, max_new_tokens=2, do_sample=False,
            return_dict_in_generate=True,
        )  # fmt: skip
        assert 0.8 * budget < held(out.past_key_values.stores) <= budget
        with pytest.raises(BadInput, match=r"kv_budget=64KiB is too small: .* Give at least"):
            small = ContextParams(kv_policy=name, kv_budget=saccade.Bytes("64KiB"))
            with saccade.attach(model, small):
                model.generate(tokens, attention_mask=mask, max_new_tokens=2, do_sample=False)


@pytest.mark.parametrize("name", ["snapkv", "pyramidkv"])
def test_a_plan_is_what_a_context_takes(models, name):
    """Layers of a pyramid keep other numbers of keys."""
    budget = saccade.Bytes("200KiB")
    params = ContextParams(kv_policy=name, kv_budget=budget, sparse=Quest(block=16))
    planned = saccade.plan(tiny_config("llama"), params, 440)
    with saccade.Context(models("llama"), params, check="off") as ctx:
        ctx.append(PROMPT)
        ctx.compress()
        assert planned.cache_bytes == held(ctx.cache.stores) <= budget.count
        kept = [store.num_slots for store in ctx.cache.stores]
        assert len(set(kept)) == (1 if name == "snapkv" else len(kept))
        assert sum(kept) == ctx.params.kv_budget * len(kept)


def test_a_budget_that_no_policy_can_keep_is_refused(models):
    """68 keys of SnapKV and room for 64 more, 1,024 bytes each."""
    params = ContextParams(kv_policy="snapkv", kv_budget=saccade.Bytes("128KiB"))
    with pytest.raises(
        BadInput,
        match=r"kv_budget=128KiB is too small: .* take 132 KiB with the 68 keys that kv_policy="
        r"'snapkv' always keeps of a head\. Give at least 132KiB\.",
    ):
        saccade.Context(models("llama"), params, check="off")
    enough = ContextParams(kv_policy="snapkv", kv_budget=saccade.Bytes("132KiB"))
    with saccade.Context(models("llama"), enough, check="off") as ctx:
        assert ctx.params.kv_budget == 68


def test_a_budget_that_keeps_all_has_no_effect():
    facts = saccade.plan(tiny_config("llama"), n_ctx=9).facts
    params = ContextParams(kv_policy="snapkv", kv_budget=saccade.Bytes("2MiB"))
    assert without_effect(facts, params)["kv_budget"] == (
        f"a budget of 2MiB keeps all of {facts.n_ctx_train} tokens"
    )
    assert not without_effect(
        facts, ContextParams(kv_policy="snapkv", kv_budget=saccade.Bytes("0.2MiB"))
    )
