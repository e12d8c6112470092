"""Every Triton kernel compiles for Hopper on any machine, to the instructions it should use."""

import os
import re

import pytest
import torch

pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels are not compiled", allow_module_level=True)

from saccade.core import DenseKV, Mask, PagedKV
from saccade.ops import make_call
from saccade.ops.attention.nvidia.triton import decode_launch, split_kv
from saccade.ops.attention.nvidia.triton.backward import backward_kv_kernel, backward_q_kernel
from saccade.ops.attention.nvidia.triton.decode import decode_kernel
from saccade.ops.attention.nvidia.triton.forward import forward_kernel
from saccade.ops.attention.nvidia.triton.quantized_decode import quantized_decode_kernel
from saccade.ops.attention.nvidia.triton.split_kv import combine_blocks, combine_kernel
from saccade.ops.attention.nvidia.triton.views import attend_view
from saccade.ops.gpu.kernel_args import (
    BlockLists,
    MaskArgs,
    PageTable,
    QuantizedStrided,
    ScoreArgs,
    SeqlenInfo,
    StridedTensor,
)
from saccade.ops.kv_write.append_kernel import append_kernel
from saccade.ops.tuning import tables as tuning
from tests.ops.compiled import compile_for, spilled_bytes

HEADS, KV_HEADS, LENGTH, DIM = 32, 8, 8192, 128
SHARED_MEMORY = 227 * 1024


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def strided(x):
    return StridedTensor(x, *x.stride()[:3])


Q, K = strided(meta(1, HEADS, LENGTH, DIM)), strided(meta(1, KV_HEADS, LENGTH, DIM))
ROWS = meta(1, HEADS, LENGTH, dtype=torch.float32)
SHARED = {
    "seqlen_info": SeqlenInfo(), "mask_args": MaskArgs(), "score_args": ScoreArgs(0.1),
    "block_lists": BlockLists(),
    "q_len": LENGTH, "k_len": LENGTH, "q_offset": 0, "groups": HEADS // KV_HEADS,
    "HEAD_DIM": DIM, "VALUE_DIM": DIM, "BLOCK_D": DIM, "BLOCK_V": DIM,
    "CAUSAL": True, "RAW": True, "PRECISION": "tf32",
}  # fmt: skip


def compiled(kernel, tables, **arguments):
    launch = next(row for limit, row in tables["sm_90"] if limit >= DIM)
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    tiles = {"BLOCK_M": launch.block_m, "BLOCK_N": launch.block_n, "STAGES": launch.stages}
    found = compile_for(kernel, options=options, **(SHARED | tiles | arguments))
    assert found.metadata.shared <= SHARED_MEMORY
    return found.asm["ptx"]


@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize(
    "mask_args", [MaskArgs(), MaskArgs(window=1024, sinks=16)], ids=["full", "window"]
)
def test_forward_uses_wgmma(tma, mask_args):
    ptx = compiled(
        forward_kernel, tuning.FORWARD, q=Q, k=K, v=K, out=Q, lse=ROWS, heads=HEADS,
        mask_args=mask_args, TMA=tma,
    )  # fmt: skip
    assert "wgmma.mma_async" in ptx
    assert ("cp.async.bulk.tensor" in ptx) == tma
    assert ("cp.async.cg" in ptx) != tma


def test_backward_has_no_atomics():
    for kernel, tables, more in (
        (backward_kv_kernel, tuning.BACKWARD_KV, {"dk": K, "dv": K, "TMA": False}),
        (backward_q_kernel, tuning.BACKWARD_Q, {"dq": Q}),
    ):
        ptx = compiled(
            kernel, tables, q=Q, k=K, v=K, dout=Q, lse2=ROWS, delta=ROWS, heads=HEADS, **more
        )
        assert "wgmma.mma_async" in ptx
        assert not re.search(r"^\s*(@\S+\s+)?(atom|red)\.", ptx, re.MULTILINE)


DECODING = {
    "q": Q, "out": strided(meta(16, HEADS, 1, DIM, dtype=torch.float32)), "lse": ROWS, "splits": 16,
    "out_split": HEADS * DIM, "lse_split": HEADS, "kv_heads": KV_HEADS, "q_len": 1,
}  # fmt: skip


@pytest.mark.parametrize("storage", ["dense", "ring", "paged"])
def test_decode_loads_asynchronously(storage):
    table = meta(1, 512, dtype=torch.int32)
    pages = PageTable(table, 512, 0, 16384, 16384) if storage == "paged" else PageTable()
    ptx = compiled(
        decode_kernel, tuning.DECODE, k=K, v=K, pages=pages, **(DECODING | {"BLOCK_M": 16}),
        spans=(0,) * 12 if storage == "ring" else None, num_slots=LENGTH, PAGE=16, PDL=True,
        REST=0, V_IN_K=False,
    )  # fmt: skip
    assert "cp.async.cg" in ptx and "mma.sync" in ptx
    assert ptx.index("griddepcontrol.wait") < ptx.index("ld.global")


def latent_launch(heads, paged, shared, arch, monkeypatch):
    """The decoding kernel as it would be launched for keys of 576 channels on `arch`, compiled."""
    seen = []
    monkeypatch.setattr(tuning, "architecture", lambda device: arch)
    monkeypatch.setattr(
        decode_launch, "launch_kernel", lambda *args, **named: seen.append((args, named))
    )
    monkeypatch.setattr(split_kv, "launch_kernel", lambda *args, **named: None)
    q, k = (
        torch.empty(1, n, length, 576, dtype=torch.bfloat16) for n, length in ((heads, 1), (1, 64))
    )
    v = k[..., :512] if shared else k[..., :512].clone()
    view = DenseKV(k, v)
    if paged:
        table, lens = torch.zeros(1, 4, dtype=torch.int32), torch.full((1,), 200, dtype=torch.int32)
        view = PagedKV(k, v, table, lens, 200)
    attend_view(make_call(q, view, mask=Mask()))
    (((_, _, *args), named),) = seen
    options = {name: named.pop(name) for name in ("num_warps", "num_stages")}
    target = GPUTarget("cuda", 90 if arch == "sm_90" else 86, 32)
    arguments = (
        dict(zip(decode_kernel.arg_names, args, strict=False)) | named | {"PDL": arch == "sm_90"}
    )
    return compile_for(decode_kernel, target, options=options, **arguments)


@pytest.mark.parametrize(
    ("heads", "paged", "shared"),
    [(128, False, True), (128, True, True), (128, False, False), (16, False, True)],
)
def test_latent_keys_are_loaded_once(heads, paged, shared, monkeypatch):
    """Rows of 64 heads are multiplied by warpgroups, each product's columns divided among them."""
    found = latent_launch(heads, paged, shared, "sm_90", monkeypatch)
    ptx = found.asm["ptx"]
    assert found.metadata.shared <= SHARED_MEMORY and spilled_bytes(found) == 0
    assert ("wgmma.mma_async" in ptx) == (heads > 16) and "cp.async.cg" in ptx
    if heads > 16:
        keys = 32  # of a tile; 16 columns of it for each of two warpgroups
        products = re.findall(r"wgmma.mma_async.sync.aligned.m64n(\d+)k16", ptx)
        assert (
            products.count("16") == 512 // 16 + 2 * 64 // 16
        )  # the second piece is computed twice
        assert products.count("256") == keys // 16 and len(products) == 42


@pytest.mark.parametrize("heads", [16, 128])
@pytest.mark.parametrize("shared", [True, False])
def test_latent_keys_fit_consumer_cards(heads, shared, monkeypatch):
    found = latent_launch(heads, False, shared, "default", monkeypatch)
    assert found.metadata.shared <= 99 * 1024


@pytest.mark.parametrize(("bits", "fp8"), [(4, False), (8, False), (8, True)])
def test_quantized_keys_are_dequantized_in_registers(bits, fp8):
    qdata = strided(meta(1, KV_HEADS, LENGTH, DIM * bits // 8, dtype=torch.uint8))
    k_scale = strided(meta(1, KV_HEADS, LENGTH // 64, DIM, dtype=torch.float16))
    v_scale = strided(meta(1, KV_HEADS, LENGTH, 2, dtype=torch.float16))
    ptx = compiled(
        quantized_decode_kernel, tuning.DECODE_QUANTIZED,
        k=QuantizedStrided(qdata, k_scale, k_scale), v=QuantizedStrided(qdata, v_scale, v_scale),
        BITS_K=bits, BITS_V=bits, FLOAT_K=fp8, FLOAT_V=fp8,
        K_GROUP=64, V_GROUP=64, FAST=True, **(DECODING | {"BLOCK_D": 64, "BLOCK_V": 64}),
    )  # fmt: skip
    assert "f16.f16" in ptx
    # Quantized keys are loaded asynchronously, four at a time, converted by byte permutations.
    assert "cp.async.cg" in ptx and "ldmatrix" in ptx and "prmt.b32" in ptx


@pytest.mark.parametrize("hadamard", [False, True])
def test_appending_compiles(hadamard):
    """RoPE, Hadamard and write in one kernel, with one store for each half of a head."""
    table, at = meta(1, 1, DIM), meta(1, dtype=torch.int64)
    found = compile_for(
        append_kernel, options={"num_warps": 4 if hadamard else 1, "num_stages": 1},
        q=Q, k=K, v=K, q_out=Q, k_store=K, v_store=K, cos=table, sin=table, table_batch=0,
        table_row=DIM, at=at, origin=meta(1, dtype=torch.int64), heads=HEADS, kv_heads=KV_HEADS,
        DIM=DIM, HALF=DIM // 2, VALUE_DIM=DIM, VALUE_HALF=DIM // 2, ROPE=True, HADAMARD=hadamard,
        PDL=True,
    )  # fmt: skip
    assert len(re.findall(r"st\.global", found.asm["ptx"])) <= 3 * (2 + 2 * hadamard)


@pytest.mark.parametrize(("rows", "splits"), [(32, 33), (32, 200), (1000, 3)])
def test_combining_splits_compiles(rows, splits):
    """In registers, without a division."""
    block_v, block_s, warps = combine_blocks(splits, DIM)
    partials = meta(splits, 1, rows, 1, DIM, dtype=torch.float32)
    found = compile_for(
        combine_kernel, options={"num_warps": warps}, split_out=partials, split_lse=partials,
        out=partials, lse=partials, splits=splits, out_stride=rows * DIM, lse_stride=rows,
        VALUE_DIM=DIM, BLOCK_V=block_v, BLOCK_S=block_s, ONCE=splits <= block_s, PDL=True,
    )  # fmt: skip
    ptx = found.asm["ptx"]
    first, last = ptx.index("griddepcontrol.launch_dependents"), ptx.index("griddepcontrol.wait")
    assert first < last < ptx.index("ld.global")
    assert not re.search(r"(ld|st)\.local|(div|rem)\.[su]64", ptx)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e4m3fn], ids=str)
def test_quantizing_compiles(dtype):
    """A group is loaded once, without local memory; fp8 values by one conversion."""
    from saccade.ops.kv_write.quantize_kernel import (
        dequantize_kernel,
        quantize_keys_kernel,
        quantize_values_kernel,
    )

    qdata = strided(meta(1, KV_HEADS, LENGTH, DIM, dtype=dtype))
    k_scale = strided(meta(1, KV_HEADS, LENGTH // 64, DIM, dtype=torch.float16))
    v_scale = strided(meta(1, KV_HEADS, LENGTH, 2, dtype=torch.float16))
    sizes = {"heads": KV_HEADS, "HALF": DIM // 2, "BLOCK_D": DIM // 2, "BITS": 8}
    packing = sizes | {"x": K, "IS_FP8": dtype != torch.uint8, "GROUP": 64}
    keys, values = (
        QuantizedStrided(qdata, k_scale, k_scale),
        QuantizedStrided(qdata, v_scale, v_scale),
    )
    options = {"num_warps": 4, "num_stages": 1}
    for kernel, arguments in (
        (quantize_keys_kernel, packing | {"storage": keys, "BLOCK": 64}),
        (quantize_values_kernel, packing | {"storage": values, "length": LENGTH, "TOKENS": 32}),
        (dequantize_kernel, sizes | {"storage": keys, "out": K, "length": LENGTH, "ROWS": 32,
                                "TOKENS": 64, "CHANNELS": 1}),
    ):  # fmt: skip
        ptx = compile_for(kernel, options=options, **arguments).asm["ptx"]
        assert not re.search(r"(ld|st)\.local", ptx)
        assert ("cvt.rn.satfinite.e4m3x2" in ptx) == (
            dtype != torch.uint8 and kernel is not dequantize_kernel
        )


@pytest.mark.parametrize("dim", [128, 256])
def test_the_transform_of_many_rows_is_a_product_of_tiles(dim):
    from saccade.ops.kv_write.hadamard_kernel import hadamard_tiles_kernel

    x, signs = meta(4096, dim), meta(128, 128)
    found = compile_for(
        hadamard_tiles_kernel, options={"num_warps": 4, "num_stages": 1}, x=x, out=x, signs=signs,
        rows=4096, PARTS=dim // 128, WIDTH=128, TILE=64,
    )  # fmt: skip
    ptx = found.asm["ptx"]
    assert "wgmma" in ptx and not re.search(r"(ld|st)\.local", ptx)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("on_device", [False, True])
def test_selecting_compiles(dtype, on_device):
    """Summaries of 128k keys, in registers."""
    from saccade.ops.attention.nvidia.block_lists import tile_list_kernel
    from saccade.ops.selection.gpu import (
        SCORED,
        SUMMED,
        choose_kernel,
        pool_kernel,
        select_kernel,
    )

    blocks, bounds = 4096, dtype == torch.bfloat16
    rows = strided(meta(1, KV_HEADS, blocks, DIM * (1 + bounds), dtype=dtype))
    scores, allowed = meta(KV_HEADS, blocks, dtype=torch.float32), meta(KV_HEADS, blocks)
    allowed, lists = allowed.to(torch.uint8), meta(KV_HEADS, blocks, dtype=torch.int32)
    at = meta(1, dtype=torch.int64) if on_device else 131_071
    shared = {"q_offset": at, "q_len": 1, "BLOCK": blocks, "DEVICE_OFFSET": on_device}
    shared |= {"scores": scores, "allowed": allowed, "num_blocks": blocks, "count": blocks,
               "q_block": 1, "k_block": 32, "sinks": 1, "window": 2, "stride": 0, "top": 61,
               "least": 0}  # fmt: skip
    for kernel, arguments in (
        (select_kernel, shared | {"q": Q, "rows": rows, "turns": lists, "group": 4,
                                  "kv_heads": KV_HEADS, "DIM": DIM, "BLOCK_D": DIM, "BLOCK_Q": 4,
                                  "SCORED": 2 * SCORED, "BOUNDS": bounds, "PDL": True}),
        (choose_kernel, shared | {"share": 0.9, "scale": 0.1, "HEADS": 4, "BY_SHARE": bounds}),
        (pool_kernel, {"q": Q, "pooled": scores, "q_len": 8192, "q_block": 64,
                       "programs": KV_HEADS, "heads": 4, "DIM": DIM, "BLOCK_D": DIM, "ROWS": SUMMED,
                       "BOUNDS": bounds}),
        (tile_list_kernel, {
            "allowed": strided(allowed[None, :, None]), "column_stride": 1, "lists": lists,
            "counts": lists, "q_offset": at, "kv_lens": None, "kv_lens_stride": None, "q_len": 1,
            "start": 0, "stop": 131_072, "columns": blocks, "heads": KV_HEADS, "groups": 4,
            "q_block": 1, "k_block": 32, "num_blocks": blocks, "window": None, "sinks": 0,
            "BLOCK_M": 16, "BLOCK_N": 32, "BLOCK": blocks, "Q_COVERED": 1, "K_COVERED": 1,
            "DEVICE_OFFSET": on_device, "CAUSAL": True, "CUT": False, "BY_KEYS": False,
            "PDL": True}),
    ):  # fmt: skip
        warps = {"num_warps": 8 if kernel is select_kernel else 16}
        ptx = compile_for(kernel, options=warps, **arguments).asm["ptx"]
        assert not re.search(r"(ld|st)\.local", ptx), kernel
        assert ("atom.global.gpu.acq_rel" in ptx) == (kernel is select_kernel)
