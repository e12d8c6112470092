"""Models whose layers keep recurrent states beside keys, or whose layers differ in shape."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import transformers

import saccade
from saccade.core import BadInput, Unsupported
from saccade.hf import Context, attach
from saccade.hf.layers import layer_kinds
from saccade.runtime import ContextParams, load_session, save_session, session, session_file
from scripts.family_configs import tiny_config, tiny_model

OLD = transformers.__version__.startswith("5.16.")

HYBRIDS = ("qwen3_next", "falcon_h1", "jamba", "bamba", "lfm2_moe")
pytestmark = pytest.mark.filterwarnings("ignore")


@cache
def model_of(name):
    return tiny_model(name, tiny_config(name))


@cache
def tokens():
    return torch.randint(3, 120, (30,), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def whole(name, ids):
    return model_of(name)(ids[None]).logits[0]


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("name", HYBRIDS)
def test_reuse_goes_back_to_a_checkpoint(name):
    ids = tokens()
    other = torch.cat((ids[:20], ids[:6]))
    with Context(model_of(name), ContextParams(n_batch=8, ctx_checkpoints=4)) as ctx:
        ctx.append(ids)
        assert ctx.reuse(other) == 16
        ours = ctx.logits(ctx.append(other[16:], wanted=10))
        close(ours, whole(name, other)[16:])
        assert ctx.reuse(ids[:5]) == 0


@pytest.mark.parametrize("name", HYBRIDS)
def test_without_checkpoints_reuse_reads_again(name):
    with Context(model_of(name)) as ctx:
        ctx.append(tokens())
        assert ctx.reuse(tokens()[:20]) == 0
        close(ctx.logits(ctx.append(tokens()[:20]))[-1], whole(name, tokens()[:20])[-1])


@pytest.mark.parametrize("name", HYBRIDS)
def test_session_holds_the_states(name, tmp_path):
    ids = tokens()
    with Context(model_of(name)) as ctx:
        ctx.append(ids[:20])
        save_session(tmp_path / "s", ctx)
    with Context(model_of(name)) as ctx:
        load_session(tmp_path / "s", ctx)
        ours = torch.cat([ctx.logits(ctx.append(part)) for part in ids[20:].split(1)])
    close(ours, whole(name, ids)[20:])


STATE_LIES = {
    "a shorter kernel": lambda state: state[:, :, 1:].clone(),
    "two rows": lambda state: torch.cat((state, state)),
    "another dtype": lambda state: state.half(),
    "NaN": lambda state: torch.full_like(state, torch.nan),
    "none": None,
}


@pytest.mark.parametrize("lie", STATE_LIES)
def test_states_that_do_not_fit_are_refused_whatever_their_checksums(lie, tmp_path):
    """The length of a state is no number of tokens: it is that of the model."""
    path, ids, change = tmp_path / "s", tokens(), STATE_LIES[lie]
    with Context(model_of("qwen3_next")) as ctx:
        ctx.append(ids[:20])
        save_session(path, ctx)
        file, key = session_file.SessionFile(path), session._identity(ctx)[1]
        tensors = file.tensors("")
        for name in [name for name in tensors if ".conv." in name or ".recurrent." in name]:
            if change is None:
                del tensors[name]
            else:
                tensors[name] = change(tensors[name])
        session_file.write(path, tensors, file.record, key=key)
        with pytest.raises(BadInput):
            load_session(path, ctx)
        assert ctx.tokens == ids[:20].tolist()
        close(ctx.logits(ctx.append(ids[20:]))[-1], whole("qwen3_next", ids)[-1])


@pytest.mark.parametrize("name", HYBRIDS)
def test_context_shift_is_refused_and_changes_nothing(name):
    ids = tokens()
    with Context(model_of(name)) as ctx:
        ctx.append(ids[:20])
        with pytest.raises(Unsupported, match="caches recurrent states"):
            ctx.shift(2)
        close(ctx.logits(ctx.append(ids[20:]))[-1], whole(name, ids)[-1])


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen3_next", "falcon_h1"])
def test_beams_move_states_with_keys(name):
    model, ids = model_of(name), tokens()[None].repeat(2, 1)
    ids[1] = ids[1].flip(0)
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": 3}
    theirs = model.generate(ids, **options)
    with attach(model) as attached:
        ours = model.generate(ids, past_key_values=attached.new_cache(), **options)
    assert torch.equal(ours, theirs)


@torch.no_grad()
def test_crop_needs_a_checkpoint_in_every_layer():
    model, ids = model_of("qwen3_next"), tokens()[None]
    with attach(model) as attached:
        kept = attached.new_cache()
        model(ids, past_key_values=kept)
        with pytest.raises(Unsupported, match="a recurrent layer cannot go back to position 27"):
            kept.crop(-3)
        assert {store.seen for store in kept.stores} == {30}


def test_a_recurrent_layer_that_begins_anew_for_several_tokens_reads_one_at_a_time():
    """Jamba of transformers ignores its states there; its chunks are then no longer equal."""
    with Context(model_of("jamba"), ContextParams(n_batch=9)) as ctx:
        ours = ctx.logits(ctx.append(tokens(), wanted=30))
    close(ours, whole("jamba", tokens()))


@pytest.mark.parametrize(
    "name",
    [*HYBRIDS, "gemma4_text", "gpt_bigcode", "mimo_v2_flash", "deepseek_v3", "gemma3n_text", "mpt"],
)
def test_plan_is_what_the_caches_take(name):
    config = tiny_config(name)
    if name == "mpt":
        with pytest.raises(Unsupported, match="does not call transformers' attention interface"):
            saccade.plan(config)
        return
    planned = saccade.plan(config, n_ctx=30, dtype=torch.float32)
    with Context(model_of(name)) as ctx:
        ctx.append(tokens())
        assert ctx.cache_bytes == planned.cache_bytes


@pytest.mark.skipif(OLD, reason="transformers 5.16 says otherwise which layers share keys")
def test_layers_that_share_keys_keep_none():
    kinds = layer_kinds(tiny_config("gemma4_text"))
    assert [kind.keys for kind in kinds].count(False) == 1
    assert kinds[2].window == 8 and kinds[1].window is None


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("mamba", "none with attention"),
        ("bloom", "does not call transformers' attention interface"),
        ("git", "GitSelfAttention computes attention itself"),
        ("moshi", "masks nothing outside of it"),
        ("minimax", "takes no other cache than one of its own class"),
        ("recurrent_gemma", "keeps the others elsewhere"),
        ("deepseek_v32", "'(indexed|deepseek_sparse)_attention'"),
    ],
)
def test_models_that_a_context_would_get_wrong_are_refused(name, why):
    with pytest.raises(Unsupported, match=why), Context(model_of(name)) as ctx:
        ctx.append(tokens())


def test_a_window_over_chunked_attention_is_refused():
    with pytest.raises(Unsupported, match="attends within chunks"):
        Context(model_of("llama4_text"), ContextParams(n_swa=4))
