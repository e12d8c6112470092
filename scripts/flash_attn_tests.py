"""Runs flash-attn's own tests of its functions against saccade.flash_attn_interface.

    python -m scripts.flash_attn_tests PATH [--device cpu] [--most 40] [-k EXPRESSION ...]

PATH is `tests/test_flash_attn.py` of a checkout of flash-attn 2.8; nothing of it is kept here.  It
imports `flash_attn`, so modules of that name are put in place for this process alone, and on a CPU
its `"cuda"` is read as `"cpu"`.  It needs einops, as the tests do.

The file has some 100,000 cases, made for GPUs.  Here run, of each test function, at most `--most`
of those without dropout whose sizes are at most `--longest` tokens, drawn with a fixed seed.
Tests that are left out are named in LEFT_OUT and TOO_LONG_ON_A_CPU, each with its reason.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor

import saccade.flash_attn_interface
from saccade.flash_attn_interface import bert_padding

LEFT_OUT = {
    "test_flash_attn_generator_arg_must_be_none": "calls the C++ extension",
    "test_flash_attn_varlen_paged_kv_num_splits": "calls a private function",
    "test_flash_attn_kvcache_paged_block_table_bounds": "expects RuntimeError, not ValueError",
}
TOO_LONG_ON_A_CPU = {"test_flash_attn_race_condition": "250 times 60 rows, to find races on a GPU"}
SIZES = ("seqlen", "seqlen_q", "seqlen_k", "paged_kv_block_size")


def apply_rotary_emb(
    x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, seqlen_offsets: object = 0
) -> Tensor:
    """What the tests take from flash_attn.layers: x `[batch, seqlen, heads, dim]` rotated.

    Written from the formula, pair by pair of channels, so it is no part of what is tested.
    """
    half = cos.shape[1]
    first = torch.as_tensor(seqlen_offsets, device=x.device).reshape(-1, 1)
    at = (first + torch.arange(x.shape[1], device=x.device)).expand(len(x), -1)
    c, s = (table.float()[at][:, :, None] for table in (cos, sin))
    one = torch.arange(half, device=x.device) * (2 if interleaved else 1)
    other = one + (1 if interleaved else half)
    a, b = x[..., one].float(), x[..., other].float()
    out = x.clone()
    out[..., one], out[..., other] = (a * c - b * s).to(x.dtype), (a * s + b * c).to(x.dtype)
    return out


def put_in_place() -> None:
    """Modules named as flash-attn's, so that its tests import saccade's functions."""
    package = ModuleType("flash_attn")
    package.__dict__.update(
        {name: getattr(saccade.flash_attn_interface, name) for name in _functions()}
    )
    interface = ModuleType("flash_attn.flash_attn_interface")
    interface.__dict__.update(package.__dict__, __name__=interface.__name__)
    interface.__dict__.update(USE_TRITON_ROCM=False, _get_block_size_n=None)
    rotary = ModuleType("flash_attn.layers.rotary")
    rotary.__dict__["apply_rotary_emb"] = apply_rotary_emb
    for module in (package, interface, rotary, ModuleType("flash_attn.layers")):
        sys.modules[module.__name__] = module
    sys.modules["flash_attn.bert_padding"] = bert_padding


def _functions() -> list[str]:
    return saccade.flash_attn_interface.__all__


class Chosen:
    """A plugin of pytest: which of the cases run."""

    def __init__(self, most: int, longest: int, left_out: dict[str, str]) -> None:
        self.most, self.longest, self.left_out = most, longest, left_out

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Keep some of the cases of every test function."""
        by_test: dict[str, list[pytest.Item]] = {}
        for item in items:
            name = item.name.partition("[")[0]
            params = getattr(getattr(item, "callspec", None), "params", {})
            if name not in self.left_out and self._fits(params):
                by_test.setdefault(name, []).append(item)
        drawn = random.Random(0)
        items[:] = [
            item
            for cases in by_test.values()
            for item in drawn.sample(cases, min(self.most, len(cases)))
        ]

    def _fits(self, params: dict[str, object]) -> bool:
        if params.get("dropout_p"):
            return False
        sizes = [params.get(name) or 0 for name in SIZES]
        return max(size for size in sizes if isinstance(size, int)) <= self.longest


def main() -> int:
    """Run the tests; the exit code is pytest's."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("path", type=Path, help="tests/test_flash_attn.py of flash-attn")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--most", type=int, default=20, help="cases of each test function")
    parser.add_argument("--longest", type=int, default=260, help="largest length, in tokens")
    parser.add_argument("-k", default="", help="as pytest's")
    given = parser.parse_args()
    put_in_place()
    text = given.path.read_text()
    if given.device == "cpu":
        text = text.replace('"cuda"', '"cpu"')
        memory = SimpleNamespace(total_memory=0)
        torch.cuda.get_device_capability = lambda device=None: (9, 0)  # type: ignore[assignment]
        torch.cuda.get_device_properties = lambda device=None: memory  # type: ignore[assignment]
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "test_flash_attn.py"
        copy.write_text(text)
        options = ["-q", "-p", "no:cacheprovider", "-c", os.devnull, "--tb=short", "-k", given.k]
        left_out = LEFT_OUT | (TOO_LONG_ON_A_CPU if given.device == "cpu" else {})
        chosen = Chosen(given.most, given.longest, left_out)
        return int(pytest.main([*options, str(copy)], [chosen]))


if __name__ == "__main__":
    sys.exit(main())
