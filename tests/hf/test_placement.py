"""Where a model is put, and in which dtype."""

from __future__ import annotations

import pytest
import torch

from saccade.core import BadInput
from saccade.hf.placement import device_of, dtype_on

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_a_model_stays_on_the_cpu_unless_told_otherwise():
    assert device_of(None) == device_of("cpu") == CPU


def test_auto_takes_a_gpu_where_there_is_one(monkeypatch):
    for here, kind in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda here=here: here)
        assert device_of("auto").type == kind


@pytest.mark.parametrize("wanted", ["gpu", "cuda:99", "meta", ""])
def test_a_device_that_is_not_there_is_refused(wanted):
    with pytest.raises(BadInput, match="device"):
        device_of(wanted)


def test_gguf_weights_become_bfloat16_on_a_gpu_only():
    assert dtype_on(GPU, torch.float32, None) is torch.bfloat16
    assert dtype_on(CPU, torch.float32, None) is torch.float32
    assert dtype_on(GPU, None, None) is None  # a folder says its own
    assert dtype_on(GPU, torch.float32, torch.float16) is torch.float16
