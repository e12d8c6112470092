"""Session files that were changed, their checksums repaired: refused, or a context that works."""

import copy
import math
import os
import random
import threading

import pytest
import torch

import saccade
from saccade.core import BadInput
from saccade.runtime import ContextParams, Sampler, session, session_file
from saccade.runtime.session import load_session, save_session
from tests.tiny_models import tiny_config, tiny_model

COUNT = int(os.environ.get("SACCADE_FUZZ", "6"))
"""Changed files of each kind of cache; thousands are a matter of minutes."""
PROMPT = (torch.arange(3, 83) % 120 + 3).tolist()
KINDS = {
    "dense": ("llama", {}),
    "ring": ("llama", {"n_swa": 16, "n_sinks": 2}),
    "int8": ("llama", {"type_k": "int8", "type_v": "int8"}),
    "paged": ("llama", {"page_size": 8}),
    "offloaded": ("llama", {"offload_kqv": False}),
    "compressed": ("llama", {"kv_policy": "snapkv", "kv_budget": 40}),
    "ragged": ("llama", {"kv_policy": "ada_snapkv", "kv_budget": 40}),
    "compressed int4": (
        "llama",
        {"kv_policy": "snapkv", "kv_budget": 40, "type_k": "int4", "type_v": "int4"},
    ),
    "hybrid": ("gemma3", {}),
}
SMALL = {
    "llama": {"num_hidden_layers": 2},
    "gemma3": {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]},
}
ODD = [None, True, -1, 0, 1, 3, 64, 2**31, 2**70, 0.5, math.nan, math.inf, "", "x", [], [1], {}]


@pytest.fixture(scope="module")
def models():
    made = {}
    return lambda name: made.setdefault(name, tiny_model(tiny_config(name, **SMALL[name])))


class Saved:
    """A session as data: the record and the tensors, and the key of its seal."""

    def __init__(self, path, model, options):
        self.path, self.model, self.params = path, model, ContextParams(**options)
        with saccade.Context(model, self.params) as ctx:
            list(ctx.stream(PROMPT, n_predict=3))
            save_session(path, ctx, Sampler(temperature=0.5))
            self.key = session._identity(ctx)[1]
        file = session_file.SessionFile(path)
        self.record, self.tensors = file.record, file.tensors("")

    def write(self, record, tensors, *, key):
        session_file.write(self.path, tensors, record, key=key)


@pytest.fixture
def saved(models, tmp_path):
    def make(kind="dense"):
        name, options = KINDS[kind]
        return Saved(tmp_path / "s", models(name), options)

    return make


def places(value, path=()):
    """Every place in a JSON value."""
    yield path
    if isinstance(value, dict | list):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(part, (*path, key))


def changed_record(record, chance):
    """The record with one value replaced or removed."""
    record = copy.deepcopy(record)
    *above, last = chance.choice([each for each in places(record) if each])
    owner = record
    for key in above:
        owner = owner[key]
    if chance.random() < 0.2:
        del owner[last]
    elif isinstance(owner[last], int) and chance.random() < 0.5:
        owner[last] += chance.choice((-1, 1, 1000))
    else:
        owner[last] = copy.deepcopy(chance.choice(ODD))
    return record


def changed_tensor(x, chance):
    """A tensor of another shape, dtype or content."""
    dim = chance.randrange(x.ndim)
    changes = [
        lambda: x.narrow(dim, 0, max(0, x.shape[dim] - 1)),
        lambda: x.narrow(dim, 0, 0),
        lambda: torch.cat((x.view(x.dtype), x), dim),
        lambda: x.unsqueeze(0),
        x.flatten,
        lambda: x.double() if x.dtype != torch.float64 else x.half(),
        lambda: torch.full_like(x.float(), math.nan).to(x.dtype),
        lambda: x.flip(dim),
        lambda: torch.empty(0, dtype=x.dtype),
    ]
    return chance.choice(changes)().contiguous()


def changed_tensors(tensors, chance):
    """The tensors with one of them changed, missing, new, or two swapped."""
    tensors = dict(tensors)
    name, other = chance.choice(list(tensors)), chance.choice(list(tensors))
    kind = chance.randrange(6)
    if kind == 0:
        del tensors[name]
    elif kind == 1:
        tensors[chance.choice((f"{name}.x", "layer.9.k", "logits", "x"))] = tensors[other]
    elif kind == 2:
        tensors[name], tensors[other] = tensors[other], tensors[name]
    else:
        tensors[name] = changed_tensor(tensors[name], chance)
    return tensors


def loaded(saved):
    """Whether the file was accepted; a refused one leaves the context as it was, and both work."""
    with saccade.Context(saved.model, saved.params) as ctx:
        first = [each.token for each in ctx.stream(PROMPT[:9], n_predict=2)]
        before = ctx.tokens, ctx.next_token, ctx.cache
        try:
            load_session(saved.path, ctx)
        except BadInput as error:
            assert str(error).endswith(".") and (ctx.tokens, ctx.next_token, ctx.cache) == before
            assert ctx.tokens == PROMPT[:9] + first and len(list(ctx.stream(n_predict=2))) == 2
            return False
        assert len(list(ctx.stream([5], n_predict=3))) == 3
        return True


@pytest.mark.parametrize("kind", KINDS)
def test_changed_and_repaired_files(saved, kind):
    """Under the right key, as only a program with the weights could: never a crash."""
    chance, whole = random.Random(kind), saved(kind)
    whole.write(whole.record, whole.tensors, key=whole.key)
    assert loaded(whole)
    for _ in range(COUNT):
        record, tensors = whole.record, whole.tensors
        if chance.random() < 0.5:
            record = changed_record(record, chance)
        else:
            tensors = changed_tensors(tensors, chance)
        whole.write(record, tensors, key=whole.key)
        loaded(whole)


def test_every_change_without_the_key_is_noticed(saved):
    chance, whole = random.Random(0), saved()
    for number in range(COUNT):
        tensors = changed_tensors(whole.tensors, chance) if number else whole.tensors
        whole.write(whole.record, tensors, key=b"")
        assert not loaded(whole)


LIES = {
    "no batch": lambda t: {"layer.1.k": t["layer.1.k"][:0], "layer.1.v": t["layer.1.v"][:0]},
    "two rows": lambda t: {n: torch.cat((t[n], t[n])) for n in ("layer.1.k", "layer.1.v")},
    "a head less": lambda t: {n: t[n][:, :1].clone() for n in ("layer.1.k", "layer.1.v")},
    "another width": lambda t: {"layer.1.v": t["layer.1.v"][..., :8].clone()},
    "another dtype": lambda t: {n: t[n].half() for n in ("layer.1.k", "layer.1.v")},
    "a token less": lambda t: {n: t[n][:, :, 1:].clone() for n in ("layer.1.k", "layer.1.v")},
    "NaN": lambda t: {"layer.0.v": torch.full_like(t["layer.0.v"], torch.nan)},
    "an extra tensor": lambda t: {"layer.1.z": t["layer.1.k"]},
    "an extra layer": lambda t: {"layer.2.k": t["layer.1.k"], "layer.2.v": t["layer.1.v"]},
    "tokens outside the vocabulary": lambda t: {"tokens": t["tokens"] + 128},
    "a token too many": lambda t: {"tokens": torch.cat((t["tokens"], t["tokens"][:1]))},
    "another random generator": lambda t: {"sampler": t["sampler"][:-1].clone()},
}


@pytest.mark.parametrize("lie", LIES)
def test_tensors_that_do_not_fit_are_refused_whatever_their_checksums(saved, lie):
    whole = saved()
    whole.write(whole.record, whole.tensors | LIES[lie](whole.tensors), key=whole.key)
    assert not loaded(whole)


def test_swapped_tensors_and_other_tokens_need_the_key(saved):
    """They have the right shapes, so only the seal tells."""
    whole = saved()
    k, v, tokens = (whole.tensors[name] for name in ("layer.0.k", "layer.0.v", "tokens"))
    for changed in ({"layer.0.k": v, "layer.0.v": k}, {"tokens": tokens.roll(1)}):
        whole.write(whole.record, whole.tensors | changed, key=b"")
        assert not loaded(whole)


def test_two_writers_and_a_reader_never_mix_two_saves(tmp_path):
    """Each save writes one number everywhere; a reader finds the same number everywhere."""
    path, ends = tmp_path / "s", threading.Event()

    def save(first):
        for number in range(first, 2 * COUNT, 2):
            tensors = {f"layer.{i}": torch.full((20_000,), number) for i in range(4)}
            session_file.write(path, tensors, {"number": number})

    save(2 * COUNT - 1)
    writers = [threading.Thread(target=save, args=(first,)) for first in (0, 1)]
    failed, reads = [], 0

    def finish():
        for each in writers:
            each.join()
        ends.set()

    for each in (*writers, threading.Thread(target=finish)):
        each.start()
    while not ends.is_set() or not reads:
        file = session_file.SessionFile(path)
        found = {int(x) for each in file.tensors("").values() for x in each.unique()}
        failed += [found] if found != {file.record["number"]} else []
        reads += 1
    assert not failed and list(tmp_path.iterdir()) == [path]


def test_a_long_name_can_be_saved(models, tmp_path):
    path = tmp_path / ("s" * 255)
    with saccade.Context(models("llama")) as ctx:
        list(ctx.stream(PROMPT[:5], n_predict=1))
        save_session(path, ctx)
        load_session(path, ctx)
    assert list(tmp_path.iterdir()) == [path]
