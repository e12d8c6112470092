"""scripts/flash_attn_tests.py, with a file of tests in place of flash-attn's own."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from scripts.flash_attn_tests import apply_rotary_emb
from tests.support.flash_attn import assert_near, rotated
from tests.support.random_inputs import normal

TEXT = """
import pytest
import torch
from flash_attn import flash_attn_func, flash_attn_with_kvcache
from flash_attn.bert_padding import pad_input, unpad_input
from flash_attn.flash_attn_interface import USE_TRITON_ROCM
from flash_attn.layers.rotary import apply_rotary_emb

is_sm90 = torch.cuda.get_device_capability("cuda") == (9, 0)

@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize("seqlen_q", [4, 5, 6, 9000])
def test_func(seqlen_q, dropout_p):
    x = torch.zeros(1, seqlen_q, 1, 8, device="cuda")
    assert flash_attn_func(x, x, x, dropout_p).shape == x.shape{more}

def test_flash_attn_generator_arg_must_be_none():
    assert False
"""


def run(folder: Path, more: str) -> subprocess.CompletedProcess[str]:
    file = folder / "test_flash_attn.py"
    file.write_text(TEXT.format(more=more))
    command = [sys.executable, "-m", "scripts.flash_attn_tests", str(file), "--most", "2"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_some_cases_of_each_test_run_without_dropout(tmp_path):
    done = run(tmp_path, "")
    assert done.returncode == 0 and "2 passed" in done.stdout, done.stdout


def test_a_failure_is_the_exit_code(tmp_path):
    done = run(tmp_path, " and seqlen_q == 0")
    assert done.returncode == 1 and "2 failed" in done.stdout, done.stdout


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("offsets", [3, [1, 4]], ids=str)
def test_what_stands_for_flash_attns_rotation(offsets, interleaved):
    x, angles = normal(2, 3, 4, 16), torch.rand(9, 4)
    cos, sin = angles.cos(), angles.sin()
    given = torch.tensor(offsets) if isinstance(offsets, list) else offsets
    found = apply_rotary_emb(x, cos, sin, interleaved=interleaved, seqlen_offsets=given)
    firsts = offsets if isinstance(offsets, list) else [offsets] * 2
    for row, first in enumerate(firsts):
        at = list(range(first, first + 3))
        assert_near(found[row], rotated(x[row], cos, sin, at, interleaved))
