"""The self-check finds what is wrong, says where, and remembers what was right."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from saccade import ContextParams, Mask, Unsupported
from saccade.cache import QuantizedCache
from saccade.hf import Context, HFModel, attention, check, check_passes, check_store
from saccade.hf.packed_layers import PackedLinear, WeightStore
from saccade.hf.register import KEY
from saccade.ops.linear import quantized
from saccade.sparse import Strided
from tests.hf.conftest import OWN_CACHE_FAMILIES
from tests.tiny_models import tiny_config, tiny_model

OPTIONS = {
    "window": ContextParams(n_swa=64, n_sinks=4),
    "int8": ContextParams(type_k="int8", type_v="int8"),
    "int4 with yarn": ContextParams(
        type_k="int4", type_v="int4", n_ctx=2048, rope_scaling_type="yarn"
    ),
    "pages": ContextParams(page_size=64),
    "small blocks": ContextParams(sparse=Strided(block=4, stride=0)),
    "compressed": ContextParams(kv_policy="ada_snapkv", kv_budget=0.1),
}


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(check_store, "_passed", set())


@pytest.fixture
def llama() -> PreTrainedModel:
    return tiny_model(tiny_config("llama"), "eager")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", OWN_CACHE_FAMILIES)
def test_rounding_to_half_precision_is_no_fault(family: str, dtype: torch.dtype) -> None:
    model: Any = tiny_model(tiny_config(family, initializer_range=0.1), "eager")
    found = check.check_eager(HFModel(model.to(dtype)))
    assert found.ok, found
    assert found.gap > 1e-3


@pytest.mark.parametrize("family", OWN_CACHE_FAMILIES)
def test_a_model_as_it_is_gives_what_its_eager_attention_gives(family: str) -> None:
    found = check.check_eager(HFModel(tiny_model(tiny_config(family), "eager")))
    assert found.ok
    assert 0 < found.gap < 1e-5


def test_rounding_is_measured_under_the_options_that_are_compared(llama: PreTrainedModel) -> None:
    """Expected: transformers' eager attention under a mask of two tokens."""
    tokens = torch.arange(3, 39)
    away = torch.arange(36)[:, None] - torch.arange(36)
    mask = torch.where((away >= 0) & (away < 2), 0.0, torch.finfo(torch.float32).min)
    with torch.inference_mode():
        expected = llama(tokens[None], attention_mask=mask[None, None]).logits[0, -5:]
    found = check_passes.rounded_otherwise(llama, ContextParams(n_swa=2), tokens).logits
    assert torch.allclose(found[0], expected, atol=1e-4)
    assert not torch.equal(found[0], found[1])


@pytest.mark.parametrize("name", OPTIONS)
def test_options_give_what_the_reference_gives(llama: PreTrainedModel, name: str) -> None:
    found = check.check_options(HFModel(llama), OPTIONS[name])
    assert found.ok, found
    assert found.layer is None


def test_a_model_that_transformers_cannot_run_is_not_compared(llama: PreTrainedModel) -> None:
    def fail(*call: Any) -> None:
        raise IndexError("pictures are missing")

    hook = llama.model.register_forward_pre_hook(fail)  # type: ignore[union-attr]
    found = check.check_eager(HFModel(llama))
    assert found.refusal is not None and "own eager attention (IndexError)" in found.refusal
    Context(llama).close()
    hook.remove()
    assert check.check_eager(HFModel(llama)).ok


def _off_by_a_little(layer: torch.nn.Module, model: PreTrainedModel, by: float) -> Any:
    def change(module: Any, args: Any, output: Any) -> Any:
        if model.config._attn_implementation == KEY:
            return (output[0] * (1 + by), *output[1:])
        return output

    return layer.register_forward_hook(change)


@pytest.mark.parametrize(
    ("dtype", "by"), [(torch.float32, 0.01), (torch.float16, 0.03), (torch.bfloat16, 0.2)]
)
def test_a_layer_that_differs_is_named(
    llama: PreTrainedModel, dtype: torch.dtype, by: float
) -> None:
    layers: Any = llama.to(dtype).model.layers  # type: ignore[arg-type]
    hook = _off_by_a_little(layers[2].self_attn, llama, by)
    with pytest.raises(Unsupported, match=r"first in model\.layers\.2\. Run this model with"):
        Context(llama)
    hook.remove()
    Context(llama).close()


@pytest.fixture
def broken_quantization(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Quantized caches hold keys that nobody appended."""
    append = QuantizedCache.append

    def wrong(self: QuantizedCache, k: torch.Tensor, v: torch.Tensor) -> Any:
        return append(self, -k, v)

    monkeypatch.setattr(QuantizedCache, "append", wrong)
    yield


@pytest.mark.usefixtures("broken_quantization")
def test_the_option_to_leave_out_is_named(llama: PreTrainedModel) -> None:
    params = ContextParams(
        type_k="int8", type_v="int8", rope_scaling_type="yarn", rope_freq_scale=0.5
    )
    with pytest.raises(Unsupported, match="Leave out type_k and type_v"):
        Context(llama, params)


def test_what_passed_is_not_checked_again(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    params = OPTIONS["window"]
    Context(llama, params).close()
    monkeypatch.setattr(check_store, "_passed", set())  # another process
    for name in ("check_eager", "check_options"):
        monkeypatch.setattr(check, name, lambda *_: pytest.fail("checked again"))
    Context(llama, params).close()
    (file,) = (tmp_path / "saccade" / "checks").iterdir()
    file.write_text("{damaged")
    with pytest.raises(pytest.fail.Exception):
        Context(llama, params)
    Context(llama, params, check="off").close()


def test_another_config_or_dtype_is_checked(llama: PreTrainedModel) -> None:
    check.verify(HFModel(llama), ContextParams())
    assert check_store.has_passed(llama, check.AS_IT_IS)
    llama.config.rms_norm_eps *= 2
    assert not check_store.has_passed(llama, check.AS_IT_IS)
    llama.config.rms_norm_eps /= 2
    assert not check_store.has_passed(llama.to(torch.float64), check.AS_IT_IS)


def test_a_folder_that_cannot_be_written_does_not_matter(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    check.verify(HFModel(llama), ContextParams())
    assert check_store.has_passed(llama, check.AS_IT_IS)


def test_the_model_is_left_as_it_was(llama: PreTrainedModel) -> None:
    before = (dict(vars(llama.config)), {n: dict(vars(m)) for n, m in llama.named_modules()})
    check.verify(HFModel(llama), OPTIONS["int4 with yarn"], "always")
    assert vars(llama.config) == before[0]
    assert {n: vars(m).keys() for n, m in llama.named_modules()} == {
        n: values.keys() for n, values in before[1].items()
    }
    assert not any(m._forward_hooks for m in llama.modules())


def test_an_unknown_mode_is_refused(llama: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="check must be one of auto, always, off, got 'yes'"):
        Context(llama, check="yes")  # type: ignore[arg-type]


def rotated_by_one(query: torch.Tensor) -> torch.Tensor:
    """Queries as they would be one position later (RoPE of base 10,000)."""
    half = query.shape[-1] // 2
    angle = 10000.0 ** (-torch.arange(half) / half)
    first, second = query.float().chunk(2, -1)
    pairs = (first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin())
    return torch.cat(pairs, -1).to(query.dtype)


FAULTS: dict[str, Any] = {
    "scale": lambda q, args, options: (q, args, options | {"scale": 1.3 * options["scale"]}),
    "softcap": lambda q, args, options: (q, args, options | {"softcap": 1.0}),
    "window": lambda q, args, options: (q, replace(args, mask=Mask(window=8)), options),
    "hides itself": lambda q, args, options: (
        q, replace(args, mask=Mask(), q_offset=args.q_offset - 1), options
    ),
    "sees later keys": lambda q, args, options: (
        q, replace(args, mask=Mask(causal=False)), options
    ),
    "rope": lambda q, args, options: (rotated_by_one(q), args, options),
    "heads": lambda q, args, options: (q.roll(1, 1), args, options),
}  # fmt: skip
"""What an implementation of attention may get wrong: (query, arguments, options) of its calls."""
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def sharp(dtype: torch.dtype) -> PreTrainedModel:
    """A Llama whose attention chooses, as that of a trained model does."""
    model = tiny_model(tiny_config("llama", initializer_range=0.05), "eager")
    return model.to(dtype)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_in_every_precision(
    fault: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, make = HFModel(sharp(dtype)), attention._call
    assert check.check_eager(model).ok

    def wrong(query: Any, args: Any, settings: Any, options: Any) -> Any:
        query, args, options = FAULTS[fault](query, args, options)
        return make(query, args, settings, options)

    monkeypatch.setattr(attention, "_call", wrong)
    found = check.check_eager(model)
    assert not found.ok


def packed(model: Any) -> Any:
    """The model with its linear layers over 8 bits in groups of 32."""
    for name, linear in list(model.named_modules()):
        if isinstance(linear, torch.nn.Linear):
            store = WeightStore(quantized(linear.weight.detach(), 8))
            parent, _, child = name.rpartition(".")
            made = PackedLinear(store, None, torch.float32, training=False)
            setattr(model.get_submodule(parent), child, made)
    return model


def test_a_fault_is_found_in_a_model_whose_products_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of many rows round x to bfloat16 on some CPUs, those of few rows do not."""
    model, make = HFModel(packed(sharp(torch.float32))), attention._call
    assert check.check_eager(model).ok
    for fault in FAULTS.values():

        def wrong(query: Any, args: Any, settings: Any, options: Any, fault: Any = fault) -> Any:
            query, args, options = fault(query, args, options)
            return make(query, args, settings, options)

        monkeypatch.setattr(attention, "_call", wrong)
        assert not check.check_eager(model).ok


def test_numbers_too_large_for_the_dtype_are_said_to_be(llama: PreTrainedModel) -> None:
    model: Any = llama.half()  # type: ignore[operator]
    model.lm_head.weight.data.fill_(6e4)
    with pytest.raises(Unsupported, match=r"in float16 are not finite\. Load it in bfloat16"):
        check.verify(HFModel(model), ContextParams())
