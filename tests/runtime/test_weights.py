"""Bytes of weights in memory: what packing really makes, for every kind, choice and shape."""

import gguf
import numpy as np
import pytest
import torch

import saccade
from saccade.ops.linear import packed_blocks, quantized
from saccade.runtime.weights import BLOCKS, Form, Matrix, grouped, held_as, stored_as
from tests.hf.gguf_files import write_gguf
from tests.tiny_models import tiny_config, tiny_model

Q = gguf.GGMLQuantizationType


def form_in_memory(packed):
    assert packed is not None
    return Form(packed.bits, packed.group, packed.minimum is not None)


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("rows", [1, 16, 37])
def test_a_kind_of_block_takes_the_bytes_of_its_packed_form(kind, rows):
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    raw = torch.zeros(rows, 512 // block * size, dtype=torch.uint8)
    packed = packed_blocks(kind, raw)
    assert form_in_memory(packed) == stored_as(kind, 512, "file", torch.float32, outer=False)
    assert Matrix(kind, rows, 512, 3).n_bytes("file", torch.float32) == 3 * packed.n_bytes


@pytest.mark.parametrize(("held", "outer", "bits"), [
    ("int8", False, 8), ("int8", True, 8), ("int4", False, 4), ("int4", True, 8),
])  # fmt: skip
def test_rounded_weights_take_the_bytes_of_what_rounding_makes(held, outer, bits):
    packed = quantized(
        torch.from_numpy(np.random.default_rng(0).normal(size=(21, 96))).float(), bits
    )
    matrix = Matrix("F16", 21, 96, is_read=not outer)
    assert form_in_memory(packed) == matrix.stored(held, torch.bfloat16)
    assert matrix.n_bytes(held, torch.bfloat16) == packed.n_bytes


@pytest.mark.parametrize(("kind", "held", "dtype", "stored"), [
    ("F16", "file", torch.float32, torch.float16),
    ("BF16", "file", torch.float32, torch.bfloat16),
    ("Q2_K", "file", torch.float32, torch.float16),
    ("Q2_K", "file", torch.bfloat16, torch.bfloat16),
    ("F32", "file", torch.float32, torch.float32),
    ("Q4_K", "plain", torch.float32, torch.float32),
    ("BF16", "plain", torch.bfloat16, torch.bfloat16),
])  # fmt: skip
def test_what_has_no_packed_form_is_plain(kind, held, dtype, stored):
    assert stored_as(kind, 256, held, dtype, outer=False) == stored
    assert Matrix(kind, 5, 256).n_bytes(held, dtype) == 5 * 256 * stored.itemsize


def test_rows_that_are_no_whole_groups_are_plain():
    assert stored_as("F32", 40, "int4", torch.float32, outer=False) == torch.float32


def test_choices_of_weights():
    assert held_as("file", None, "cpu", is_folder=False) == ("file", torch.float32)
    assert held_as("file", None, "cuda", is_folder=False) == ("plain", torch.bfloat16)
    assert held_as("file", None, "cpu", is_folder=True) == ("plain", None)
    assert held_as("file", torch.float16, "cpu", is_folder=True) == ("plain", torch.float16)
    assert held_as("int4", None, "cpu", is_folder=True) == ("int4", torch.float32)
    assert held_as("bf16", None, "cpu", is_folder=False) == ("plain", torch.bfloat16)
    assert held_as("f32", None, "cuda", is_folder=True) == ("plain", torch.float32)


def test_matrices_that_are_alike_are_counted_together():
    one, other = Matrix("F16", 4, 8), Matrix("F16", 8, 4)
    assert grouped([one, other, one]) == (Matrix("F16", 4, 8, 2), other)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_plans_of_files_are_what_loading_takes(family, tmp_path):
    path = tmp_path / "tiny.gguf"
    kinds = {"blk.0.attn_q.weight": Q.Q4_0, "blk.0.ffn_up.weight": Q.Q8_0,
             "blk.1.ffn_up.weight": Q.F16, "token_embd.weight": Q.Q5_1}  # fmt: skip
    model = tiny_model(tiny_config(family, vocab_size=300))
    write_gguf(model, path, family, quantized=kinds)
    for weights in ("file", "int8", "int4", "bf16", "f32"):
        loaded = saccade.load_model(path, weights=weights)
        planned = saccade.plan(path, n_ctx=16, weights=weights)
        assert planned.weights_bytes == loaded.weights_bytes, weights
        assert saccade.plan(loaded, n_ctx=16).weights_bytes == loaded.weights_bytes


def test_plans_of_folders_are_what_loading_takes(tmp_path):
    tiny_model(tiny_config("llama", dtype=torch.bfloat16)).to(torch.bfloat16).save_pretrained(
        tmp_path
    )
    for weights in ("file", "int8", "int4", "bf16", "f32"):
        loaded = saccade.load_model(tmp_path, weights=weights)
        planned = saccade.plan(tmp_path, n_ctx=16, weights=weights)
        assert planned.weights_bytes == loaded.weights_bytes, weights
