"""Planned peaks against what PyTorch's allocator gave out while a model read."""

import pytest
import torch

import saccade
from saccade.advice.peak import memory_of
from saccade.ops.allocated import AllocatedPeak
from saccade.ops.linear import forward, native
from saccade.runtime import ContextParams
from saccade.runtime.plan_files import from_config
from tests.tiny_models import tiny_config, tiny_model

SIZES = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 3, "vocab_size": 512}
SETTINGS = {
    "dense": {},
    "bf16": {"type_k": "bf16", "type_v": "bf16"},
    "int8": {"type_k": "int8", "type_v": "int8"},
    "int4": {"type_k": "int4", "type_v": "int4"},
    "window": {"n_swa": 256, "n_sinks": 4},
    "snapkv": {"kv_policy": "snapkv", "kv_budget": 0.25},
    "h2o": {"kv_policy": "h2o", "kv_budget": 0.25},
    "rkv": {"kv_policy": "rkv", "kv_budget": 0.25},
    "knorm": {"kv_policy": "knorm", "kv_budget": 0.25},
}


@pytest.fixture(scope="module")
def model():
    return tiny_model(tiny_config("llama", max_position_embeddings=4096, **SIZES))


@pytest.fixture(params=["panels", "tiles", "none"])
def kernels(request, monkeypatch):
    """How products of many rows are computed: as this machine does, by tiles, by PyTorch alone."""
    monkeypatch.setattr(native, "BUILT", native.BUILT and request.param != "none")
    if request.param == "tiles" and native.BUILT:
        for module in (native, forward):
            monkeypatch.setattr(module, "target", lambda: "scalar")
    caches = forward.product_dtype, forward.multiplies_bfloat16
    for each in caches:
        each.cache_clear()
    yield request.param
    for each in caches:
        each.cache_clear()


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("n_batch", [40, 256, 600])
def test_products_with_packed_weights_are_in_the_peak(tmp_path, model, kernels, weights, n_batch):
    model.save_pretrained(tmp_path / "m")
    loaded = saccade.load_model(tmp_path / "m", weights=weights, device="cpu")
    found = from_config(loaded.model.config.to_dict() | {"dtype": "float32"}, "tiny", None)
    tokens, params = 1200, ContextParams(n_batch=n_batch)
    planned = memory_of(found.holding(weights), params, tokens, "cpu")
    with saccade.Context(loaded, params) as ctx:
        ids = torch.arange(tokens) % 512
        forward._buffers.of.clear()
        with AllocatedPeak(torch.device("cpu")) as allocated:
            ctx.append(ids)
    measured = planned.weights + allocated.bytes
    if kernels == "none":  # how PyTorch makes numbers plain is not followed step by step
        assert 0.6 * planned.peak < measured < 1.01 * planned.peak
    else:
        assert abs(planned.peak / measured - 1) < 0.05, (planned, measured)


@pytest.mark.parametrize("name", SETTINGS)
def test_peaks_within_5_percent_and_caches_to_the_byte(model, name):
    tokens, params = 1200, ContextParams(n_batch=256, **SETTINGS[name])
    found = from_config(model.config.to_dict() | {"dtype": "float32"}, "tiny", None)
    planned = memory_of(found, params, tokens, "cpu")
    with saccade.Context(model, params) as ctx:
        ids = torch.arange(tokens) % 512
        with AllocatedPeak(torch.device("cpu")) as allocated:
            ctx.append(ids)
            ctx.compress()
        assert planned.caches == ctx.cache_bytes
    measured = planned.weights + allocated.bytes
    assert planned.weights == sum(p.nbytes for p in model.parameters())
    assert abs(planned.peak / measured - 1) < 0.05, (planned, measured)
