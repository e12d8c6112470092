"""Where a model is put, and in which dtype."""

from __future__ import annotations

import pytest
import torch

from saccade.core import BadInput
from saccade.runtime.placement import device_of, form_and_dtype

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


def chosen(weights: object = "file", dtype: object = None, device=CPU, *, folder: bool = False):
    return form_and_dtype(weights, dtype, device, is_folder=folder)


def test_a_gguf_file_is_packed_on_a_cpu_and_plain_bfloat16_on_a_gpu():
    assert chosen() == ("file", torch.float32)
    assert chosen(dtype=torch.bfloat16) == ("file", torch.bfloat16)
    assert chosen(device=GPU) == ("plain", torch.bfloat16)
    assert chosen(dtype=torch.float16, device=GPU) == ("plain", torch.float16)


def test_a_folder_says_its_own_dtype():
    assert chosen(folder=True) == chosen(device=GPU, folder=True) == ("plain", None)
    assert chosen(dtype=torch.float16, folder=True) == ("plain", torch.float16)


@pytest.mark.parametrize("folder", [True, False])
def test_other_forms_are_the_same_for_folders_and_files(folder):
    assert chosen("f32", folder=folder) == ("plain", torch.float32)
    assert chosen("f32", torch.float64, folder=folder) == ("plain", torch.float64)
    assert chosen("bf16", device=GPU, folder=folder) == ("plain", torch.bfloat16)
    assert chosen("int4", folder=folder) == ("int4", torch.float32)
    assert chosen("int8", device=GPU, folder=folder) == ("int8", torch.bfloat16)


@pytest.mark.parametrize(
    ("weights", "dtype"),
    [
        ("f32", torch.bfloat16),
        ("bf16", torch.float32),
        ("int4", torch.float64),
        ("file", torch.float64),
    ],
)
def test_a_form_and_a_dtype_that_exclude_each_other_are_refused_in_one_sentence(weights, dtype):
    with pytest.raises(ValueError, match=f"weights='{weights}' goes with dtype=") as caught:
        chosen(weights, dtype)
    assert "\n" not in str(caught.value) and str(dtype) in str(caught.value)


def test_what_is_no_form_is_refused():
    with pytest.raises(ValueError, match="expected one of file, int8, int4, bf16, f32 as weights"):
        chosen("q4")
    with pytest.raises(TypeError, match="expected one of file, .* as weights, got None"):
        chosen(None)
