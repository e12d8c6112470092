"""Merging heads in a common basis: what a model allows; nothing is lost where heads agree."""

from __future__ import annotations

import pytest
import torch

from saccade.core import BadInput, Unsupported
from saccade.hf import converted_heads
from saccade.hf.convert_aligned import shared_basis
from saccade.hf.convert_freedom import Freedom, freedoms, turned
from saccade.hf.convert_pairs import Complex, Pairs
from saccade.hf.heads import layers_of, read_heads
from saccade.hf.key_rotation import KeyRotation
from saccade.hf.layers import attention_modules
from tests.hf.model_state import different, state_of
from tests.tiny_models import tiny_config, tiny_model

TURNED = ("llama", "qwen2", "gemma2", "phi3")
NORMED = ("qwen3", "gemma3")


def random_text() -> torch.Tensor:
    return torch.randint(3, 128, (256,), generator=torch.Generator().manual_seed(1))


def agreeing(family: str, *, kv_heads: int = 2, only_signs: bool = False):
    """A float64 model whose neighbouring KV heads are equal, each then turned at random.

    Norms of keys get uneven weights, or they would let a rotation pass.
    """
    model = tiny_model(tiny_config(family, num_key_value_heads=kv_heads)).double()
    random = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, part in model.named_parameters():
            if name.endswith(("q_norm.weight", "k_norm.weight")):
                part.copy_(0.5 + torch.rand(part.shape, generator=random))
        for module, freedom in zip(modules_of(model), freedoms(model, 4, kv_heads)[0], strict=True):
            heads = read_heads(module, 4, kv_heads)
            k, v = (p.unflatten(0, (-1, 2))[:, :1].expand(-1, 2, -1, -1).flatten(0, 1) for p in
                    (heads.k, heads.v))  # fmt: skip
            same = type(heads)(heads.q, k, v, heads.o)
            allowed = Freedom(freedom.pairs, only_signs, values=True)
            install(module, turned(same, allowed, random))
    return model


def modules_of(model) -> list:
    return [module for _, module in attention_modules(model)]


def install(module, heads) -> None:
    old = read_heads(module, len(heads.q), len(heads.k))
    for name, layer in layers_of(module, heads, old).items():
        setattr(module, name, layer)


@torch.no_grad()
@pytest.mark.parametrize("family", TURNED)
def test_turning_heads_alone_leaves_the_output_to_rounding(ids, family):
    model = tiny_model(tiny_config(family)).double()
    plain = model(ids).logits
    found, notes = freedoms(model, 4, 2)
    assert notes == [] and all(each.values and not each.only_signs for each in found)
    random = torch.Generator().manual_seed(3)
    for module, freedom in zip(modules_of(model), found, strict=True):
        before = read_heads(module, 4, 2)
        install(module, turned(before, freedom, random))
        assert not torch.allclose(read_heads(module, 4, 2).k, before.k, atol=0.1)
    torch.testing.assert_close(model(ids).logits, plain, atol=1e-9, rtol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen2", "phi3"])
def test_heads_that_agree_up_to_their_basis_merge_without_loss(ids, family):
    model = agreeing(family)
    plain, kept = model(ids).logits, state_of(model)
    with converted_heads(model, 1, method="aligned", calibration=random_text()) as done:
        torch.testing.assert_close(model(ids).logits, plain, atol=1e-6, rtol=1e-6)
        assert (done.before, done.after, done.notes) == (2, 1, [])
    with converted_heads(model, 1):
        assert (model(ids).logits - plain).abs().max() > 0.1
    assert different(kept, state_of(model)) == []


@torch.no_grad()
def test_groups_of_heads_merge_each_for_itself(ids):
    model = agreeing("llama", kv_heads=4)
    plain = model(ids).logits
    with converted_heads(model, 2, method="aligned", calibration=random_text()):
        torch.testing.assert_close(model(ids).logits, plain, atol=1e-6, rtol=1e-6)
    with converted_heads(model, 1, method="aligned", calibration=random_text()):
        assert (model(ids).logits - plain).abs().max() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("family", NORMED)
def test_normed_keys_are_merged_up_to_signs_and_that_is_said(ids, family):
    model = agreeing(family, only_signs=True)
    plain = model(ids).logits
    with converted_heads(model, 1, method="aligned", calibration=random_text()) as done:
        torch.testing.assert_close(model(ids).logits, plain, atol=1e-6, rtol=1e-6)
    assert len(done.notes) == 1 and "up to signs only" in done.notes[0]


@torch.no_grad()
def test_what_stands_between_values_and_output_is_noticed(ids):
    model = tiny_model(tiny_config("llama"))
    for module in modules_of(model):
        module.o_proj.register_forward_pre_hook(lambda _, args: (args[0].tanh(),))
    outputs = [module.o_proj for module in modules_of(model)]
    with converted_heads(model, 1, method="aligned", calibration=random_text()) as done:
        assert model(ids).logits.isfinite().all()
        assert [module.o_proj for module in modules_of(model)] == outputs
    assert len(done.notes) == 1 and done.notes[0].startswith("values are averaged")


@torch.no_grad()
def test_aligned_loses_less_than_the_mean_on_ordinary_heads(ids):
    model = tiny_model(tiny_config("llama"))
    plain, gaps = model(ids).logits, {}
    for method in ("mean", "aligned"):
        with converted_heads(model, 1, method=method, calibration=random_text()):
            gaps[method] = (model(ids).logits - plain).norm()
    assert gaps["aligned"] < 0.8 * gaps["mean"]


def test_a_shared_basis_loses_what_the_smallest_principal_components_hold():
    random = torch.Generator().manual_seed(0)
    x = torch.randn(500, 3 * 4, generator=random, dtype=torch.float64)
    x = x @ torch.randn(12, 12, generator=random, dtype=torch.float64)
    moments = (x.T @ x).view(3, 4, 3, 4)
    encode, decode = shared_basis(moments, torch.eye(4, dtype=torch.float64).expand(3, 4, 4))
    back = x @ encode.flatten(1).T @ decode.flatten(0, 1).T
    dropped = torch.linalg.svdvals(x)[4:].square().sum()
    torch.testing.assert_close((x - back).square().sum(), dropped)


@pytest.mark.parametrize(
    ("rotation", "first", "second", "rest"),
    [
        (KeyRotation(torch.ones(2)), [0, 1], [2, 3], [4, 5]),
        (KeyRotation(torch.ones(2), interleaved=True), [0, 2], [1, 3], [4, 5]),
        (KeyRotation(torch.ones(2), first=2), [2, 3], [4, 5], [0, 1]),
        (KeyRotation(torch.ones(0)), [], [], [0, 1, 2, 3, 4, 5]),
    ],
)
def test_pairs_are_those_that_positions_turn(rotation, first, second, rest):
    pairs = Pairs.of(rotation, 6)
    assert (pairs.first.tolist(), pairs.second.tolist(), pairs.rest.tolist()) == (
        first,
        second,
        rest,
    )


def test_moments_of_pairs_are_those_of_complex_numbers():
    x = torch.randn(50, 2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    block = Complex(torch.tensor([0, 1]), torch.tensor([2, 3]))
    found = block.moments(torch.einsum("ngd,nhe->gdhe", x, x))[:, :, 0, :, 0]
    z = torch.complex(x[..., :2], x[..., 2:])
    torch.testing.assert_close(found, torch.einsum("ngf,nhf->fgh", z, z.conj()))


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        (torch.tensor([1, 2, 400]), "outside the vocabulary"),
        (torch.tensor([1.0, 2.0]), "whole numbers"),
        (torch.tensor([3]), "at least two tokens"),
    ],
)
def test_a_calibration_that_is_no_text_is_refused(llama, tokens, said):
    with pytest.raises(BadInput, match=said):
        converted_heads(llama, 1, method="aligned", calibration=tokens).__enter__()


def test_norms_over_all_heads_are_refused():
    model = tiny_model(olmo2())
    with pytest.raises(Unsupported, match=r"k_norm.weight of Olmo2ForCausalLM has another shape"):
        converted_heads(model, 1).__enter__()


def olmo2():
    from transformers import Olmo2Config

    from tests.tiny_models import COMMON

    return Olmo2Config(**{name: value for name, value in COMMON.items() if name != "head_dim"})
