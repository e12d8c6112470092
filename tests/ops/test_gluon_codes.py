"""The Gluon kernel over codes: the contract on a Hopper card; elsewhere that it compiles."""

import os
import re
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Gluon has no interpreter", allow_module_level=True)

from triton.experimental.gluon._runtime import GluonASTSource

from saccade.core import DenseKV, GrowingKV, KeyRange, Mask, QuantizedKV
from saccade.core.formats import Codes, quantize_keys, quantize_values
from saccade.ops import attend
from saccade.ops.attend import gluon_codes_launch as launcher
from saccade.ops.attend.api import make_call
from saccade.ops.attend.gluon import HOPPER
from saccade.ops.attend.triton_problem import problem_of
from saccade.ops.attend.triton_quantized import Coded
from saccade.ops.tiles import Bounds, Plane, Rules
from tests.ops.compiled import compile_for

FORMATS = ["int8", "int4", "fp8"]
ON_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == HOPPER


def on_the_card(test):
    """A test that needs a Hopper GPU."""
    return pytest.mark.gpu(pytest.mark.skipif(not ON_HOPPER, reason="needs a Hopper GPU")(test))


def coded(x, quantize, form, group, device):
    bits = 4 if form == "int4" else 8
    found = quantize(x, bits=bits, group=group, fp8=form == "fp8")
    return Codes(*(part.to(device) for part in found)), bits


def view_of(forms, *, dim=128, keys=320, recent=9, v_group=64, dtype=torch.bfloat16, device="cpu"):
    """Codes of random keys with outlying channels, and recent keys behind them."""
    k = torch.randn(2, 2, keys, dim) * torch.randn(1, 2, 1, dim).exp() + torch.randn(1, 2, 1, dim)
    (keys_, bits_k), (values, bits_v) = (
        coded(k.to(dtype), quantize_keys, forms[0], 64, device),
        coded(torch.randn(k.shape).to(dtype) + 0.5, quantize_values, forms[1], v_group, device),
    )
    recents = [torch.randn(2, 2, recent, dim).to(dtype).to(device) for _ in range(2)]
    return QuantizedKV(keys_, values, *recents, bits_k, bits_v, 64)


def covered(q, view, mask=None):
    call = make_call(q, view, mask=mask or Mask())
    return launcher.covers(problem_of(call, view.recent_k, view.recent_v, None), view)


CASES = [
    ((form, form), {}, Mask(), 1) for form in FORMATS
] + [
    (("int8", "int4"), {"v_group": 128}, Mask(), 3),
    (("int4", "fp8"), {"dim": 64}, Mask(), 2),
    (("int4", "int4"), {"dim": 64, "v_group": 32}, Mask(), 16),
    (("fp8", "int8"), {"dtype": torch.float16}, Mask(causal=False), 5),
    (("int8", "int8"), {"recent": 100}, Mask(window=64), 1),
    (("int4", "int4"), {}, Mask(window=90, sinks=3), 4),
    (("int8", "int8"), {"keys": 64, "recent": 0}, Mask(), 1),
]  # fmt: skip


@on_the_card
@pytest.mark.parametrize(("forms", "options", "mask", "queries"), CASES, ids=str)
@pytest.mark.parametrize("sink", [False, True])
def test_contract(forms, options, mask, queries, sink):
    """At most twice the error of an eager run in the same precision, as every backend."""
    view = view_of(forms, device="cuda", **options)
    q = torch.randn(2, 8, queries, view.shape[3]).to(view.dtype).cuda()
    assert covered(q, view, mask)
    logits = torch.randn(8, device="cuda") if sink else None
    whole = dense(view)
    wide = dense(replace(view, recent_k=view.recent_k.double(), recent_v=view.recent_v.double()))
    truth = attend(q.double(), wide, mask=mask, sink_logits=logits, backend="reference")
    eager = attend(q, whole, mask=mask, sink_logits=logits, backend="reference")
    ours = attend(q, view, mask=mask, sink_logits=logits, backend="triton")
    allowed = 2 * (eager.out - truth.out).abs().max() + 1e-3
    assert (ours.out - truth.out).abs().max() <= allowed
    assert (ours.lse - truth.lse).abs().max() < 2e-2


def dense(view):
    """The same keys and values in full precision."""
    tile = next(iter(view.tiles([KeyRange(0, view.shape[2])], view.shape[2])))
    return DenseKV(tile.k, tile.v)


@on_the_card
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(("packed", "recent"), [(0, 5), (64, 1), (320, 33)])
def test_growing(form, packed, recent):
    """What lies behind a fill that only the device knows is never seen, even where it is nan."""
    view = view_of((form, form), keys=512, recent=48, device="cuda")
    for part, first in ((view.k, packed // 64), (view.v, packed)):
        part.scale[:, :, first:], part.offset[:, :, first:] = torch.nan, torch.nan
    filled = replace(
        view,
        k=Codes(view.k.codes[:, :, :packed], *(x[:, :, : packed // 64] for x in view.k[1:])),
        v=Codes(*(x[:, :, :packed] for x in view.v)),
        recent_k=view.recent_k[:, :, :recent],
        recent_v=view.recent_v[:, :, :recent],
    )
    q = torch.randn(2, 8, 2, 128, device="cuda").bfloat16()
    truth = attend(q, filled, mask=Mask(), backend="reference")
    stop = torch.tensor([packed + recent], device="cuda")
    growing = GrowingKV(view, torch.tensor([packed], device="cuda"))
    ours = attend(
        q, growing, mask=Mask(), lengths=stop.expand(2), q_offset=(stop - 2).expand(2),
        backend="triton",
    )  # fmt: skip
    assert (ours.out - truth.out).abs().max() < 3e-2
    assert (ours.lse - truth.lse).abs().max() < 2e-2


def test_what_is_covered(monkeypatch):
    monkeypatch.setattr(launcher.tuning, "architecture", lambda device: "sm_90")
    view, q = view_of(("int8", "int4")), torch.randn(2, 8, 1, 128).bfloat16()
    assert covered(q, view)
    assert covered(q, view_of(("fp8", "fp8"), v_group=128))
    assert not covered(q.float(), view)  # its products are taken in float16
    assert not covered(q, view_of(("int8", "int8"), v_group=32))  # four scales a token
    assert not covered(q, replace(view, k_group=32))
    wide = torch.cat((view.k.codes,) * 2, 3)[..., :128]  # rows with a gap between them
    assert not covered(q, replace(view, k=view.k._replace(codes=wide)))


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("form", FORMATS)
def test_compiles_for_hopper(form, dim):
    """Codes are copied asynchronously and meet the matrix units without any exchange."""
    from saccade.ops.attend.gluon_codes import codes_kernel

    def plane(*shape, dtype=torch.float16):
        x = torch.empty(shape, dtype=dtype, device="meta")
        return Plane(x, *x.stride()[:3])

    groups, length = dim // 64, 8192
    kind = torch.float8_e4m3fn if form == "fp8" else torch.uint8
    codes = plane(1, 8, length, dim // 2 if form == "int4" else dim, dtype=kind)
    k_scale, v_scale = plane(1, 8, length // 64, dim), plane(1, 8, length, groups)
    found = compile_for(
        codes_kernel, options={"num_warps": 1, "maxnreg": launcher.LAUNCH.registers},
        source=GluonASTSource, q=plane(1, 32, 1, dim, dtype=torch.bfloat16),
        k=Coded(codes, k_scale, k_scale), v=Coded(codes, v_scale, v_scale),
        out=plane(16, 32, 1, dim, dtype=torch.float32),
        lse=torch.empty(16, 1, 32, device="meta"), bounds=Bounds(), rules=Rules(),
        sink_logits=None, scale=0.1, q_len=1, k_len=length, q_offset=length - 1, splits=16,
        out_split=32 * dim, lse_split=32, kv_heads=8, groups=4, D=dim, K_FORMAT=form, V_FORMAT=form,
        K_GROUP=64, V_GROUPS=groups, CAUSAL=True,
    )  # fmt: skip
    ptx = found.asm["ptx"]
    assert "cp.async.cg" in ptx and "ldmatrix" not in ptx and "bar.sync" not in ptx
    assert not re.search(r"(ld|st)\.local", ptx)
    assert ptx.count("mma.sync") == {64: 36, 128: 72}[dim]
    assert ("cvt.rn.f16x2.e4m3x2" in ptx) == (form == "fp8")
