"""Fixtures that several test modules of the operators share."""

import pytest

from saccade.ops.attention.cpu import binding

_cpu = binding.extension()


@pytest.fixture(params=[] if _cpu is None else _cpu.targets())
def target(request, monkeypatch):
    """Each SIMD target of the C++ kernels that this machine can run."""
    monkeypatch.setattr(binding, "target", lambda: request.param)
    return request.param
