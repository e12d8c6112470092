"""Keys in host memory: the same attention, two staging buffers on the device for all layers.

Without a GPU keys are staged between two buffers in host memory, which tests which layer is in
which buffer; with a GPU, streams and pinned memory are tested too.
"""

import pytest
import torch

from saccade.cache import DenseCache, OffloadedCache, StagingBuffers
from saccade.core import Mask
from saccade.ops import attend

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=DEVICES)
def device(request, monkeypatch):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    monkeypatch.setattr(OffloadedCache, "_is_staged", lambda self: True)
    return torch.device(request.param)


def model_of(layers):
    staging = StagingBuffers()
    return (
        staging,
        [OffloadedCache(staging) for _ in range(layers)],
        [DenseCache() for _ in range(layers)],
    )


def step(ours, plain, count, device, batch=2):
    """One pass through all layers; every layer has keys of its own."""
    for a, b in zip(ours, plain, strict=True):
        q = torch.randn(batch, 4, count, 16, device=device)
        k = torch.randn(batch, 2, count, 16, device=device)
        v = torch.randn(batch, 2, count, 16, device=device)
        outs = [attend(q, cache.append(k, v), mask=Mask()).out for cache in (a, b)]
        assert torch.allclose(*outs, atol=1e-5)


@pytest.mark.parametrize("layers", [1, 2, 3, 4, 7])
def test_all_layers_attend_to_their_own_keys(device, layers):
    staging, ours, plain = model_of(layers)
    for count in (50, 1, 1, 30, 1, 1, 1):
        step(ours, plain, count, device)
    k = ours[0].host[0]
    assert all(cache.host[0].device.type == "cpu" for cache in ours)
    assert k.is_pinned() == (device.type == "cuda")
    buffers = min(2, layers)
    assert staging.nbytes == buffers * 2 * k.nbytes
    assert sum(cache.nbytes for cache in ours) == (layers + buffers) * 2 * k.nbytes


def test_the_next_layer_is_prefetched(device):
    staging, ours, plain = model_of(3)
    for _ in range(2):
        step(ours, plain, 5, device)
    for i, cache in enumerate(ours):
        assert cache in staging._resident
        k = torch.zeros(2, 2, 1, 16, device=device)
        cache.append(k, k)
        assert staging._resident[1 - staging._current] is ours[(i + 1) % 3]


def test_changes_of_the_host_copy_are_loaded_again(device):
    """Reorder, truncate, context shift, reset."""
    _, ours, plain = model_of(3)
    step(ours, plain, 40, device)
    for both in zip(ours, plain, strict=True):
        for cache in both:
            cache.reorder(torch.tensor([1, 0, 1], device=device))
    step(ours, plain, 4, device, batch=3)
    for both in zip(ours, plain, strict=True):
        for cache in both:
            cache.truncate(cache.max_rollback(30))
    step(ours, plain, 4, device, batch=3)
    for both in zip(ours, plain, strict=True):
        for cache in both:
            cache.context_shift(5, 20, lambda keys, delta: keys + delta)
    step(ours, plain, 4, device, batch=3)
    assert {cache.seen for cache in ours} == {23}
    for both in zip(ours, plain, strict=True):
        for cache in both:
            cache.reset()
    step(ours, plain, 9, device, batch=3)


def test_on_a_cpu_nothing_is_staged():
    staging = StagingBuffers()
    cache = OffloadedCache(staging)
    k = torch.randn(1, 1, 5, 8)
    view = cache.append(k, k)
    assert view.k.data_ptr() == cache.host[0].data_ptr() and staging.nbytes == 0
