"""The Gluon prefill kernel, compiled for Hopper on a machine without a GPU."""

from __future__ import annotations

import re
import subprocess

import pytest

pytest.importorskip("triton")

from saccade.ops.gpu.kernel_args import MaskArgs
from tests.ops.compiled import compile_gluon


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_compiles_for_hopper_with_overlapped_products(dim):
    found = compile_gluon(dim)
    ptx = found.asm["ptx"]
    assert found.metadata.shared <= 227 * 1024
    assert "setmaxnreg" in ptx and "cp.async.bulk.tensor.4d" in ptx
    # S of a tile is issued, then P V of the tile before, then one of the two is awaited.
    order = re.findall(r"wgmma\.(commit_group|wait_group\.sync\.aligned (?:0|1))", ptx)
    issue = "commit_group"
    assert [issue, issue, "wait_group.sync.aligned 1"] in [order[i : i + 3] for i in range(9)]


@pytest.mark.parametrize(
    ("dim", "variant"),
    [
        (128, {}),
        (256, {}),
        (96, {}),
        (192, {"value_dim": 128}),
        (128, {"mask_args": MaskArgs(window=1024)}),
        (128, {"blocks": (1, 1)}),
        (128, {"blocks": (2, 2)}),
        (64, {"blocks": (4, 4)}),
        (128, {"varlen": "packed"}),
        (128, {"varlen": "kv_lens", "page_size": 16}),
        (128, {"sharing": (4, 8), "varlen": "kv_lens"}),
        (256, {"sharing": (2, 8)}),
        (128, {"softcap": 50.0}),
        (64, {"alibi": True, "causal": False}),
        (128, {"softcap": 50.0, "alibi": True, "blocks": (2, 2)}),
        (128, {"softcap": 50.0, "alibi": True, "sharing": (4, 8)}),
    ],
    ids=[
        "128",
        "256",
        "96",
        "192",
        "window",
        "blocks",
        "blocks of 64",
        "of 32",
        "packed",
        "pages",
        "split",
        "256 split",
        "softcap",
        "alibi",
        "blocks of 64, both",
        "split, both",
    ],
)
def test_products_are_not_serialized_and_nothing_spills(tmp_path, dim, variant):
    """ptxas reports both, and serializes the products when they are issued in another order.

    Some numbers of a tile that heads share wait in memory while it loops over blocks, or over
    scores with softcap and ALiBi.
    """
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

    source = tmp_path / "kernel.ptx"
    source.write_text(compile_gluon(dim, **variant).asm["ptx"])
    command = [get_ptxas(90).path, "-v", f"--gpu-name={sm_arch_from_capability(90)}", source]
    done = subprocess.run(
        [*command, "-o", tmp_path / "kernel"], capture_output=True, text=True, check=True
    )
    assert "serialized" not in done.stderr
    spilled = re.search(r"(\d+) bytes spill stores", done.stderr)
    assert spilled is not None and int(spilled[1]) <= spills_of(variant)


def spills_of(variant):
    """Bytes a thread that may spill."""
    return 96 if len(variant) == 3 else 40 if variant == {"blocks": (2, 2)} else 0
