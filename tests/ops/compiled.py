"""Compile Triton and Gluon kernels for a GPU that this machine need not have."""

import re
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from saccade.ops.gpu.kernel_args import (
    BlockLists,
    MaskArgs,
    PageTable,
    QuantizedStrided,
    StridedTensor,
)

RULES = MaskArgs()
HOPPER = GPUTarget("cuda", 90, 32)
TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.bool: "*i1",
}


def compile_for(
    kernel: Any,
    target: GPUTarget = HOPPER,
    *,
    options: dict,
    source: Any = ASTSource,
    **arguments: Any,
) -> Any:
    """The compiled kernel; integers and pointers count as aligned where they are multiples of 16.

    Args:
        options: num_warps and num_stages.
        source: ASTSource, or Gluon's.
        arguments: what a launch would pass, by name; tensors may be on the meta device.
    """
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list] = {}

    def describe(value, path, fixed):
        if isinstance(value, tuple):
            parts = [describe(part, (*path, i), fixed) for i, part in enumerate(value)]
            return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
        if value is None or fixed or isinstance(value, (bool, str)):
            constants[path] = value
            return "constexpr"
        if isinstance(value, torch.Tensor):
            attributes[path] = [["tt.divisibility", 16]]
            return TYPES[value.dtype]
        if isinstance(value, float):
            return "fp32"
        if value % 16 == 0:
            attributes[path] = [["tt.divisibility", 16]]
        return "i32"

    signature = {}
    for i, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        signature[parameter.name] = describe(value, (i,), parameter.is_constexpr)
    parsed = source(kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(parsed, target=target, options=options)


def spilled_bytes(found: Any) -> int:
    """What ptxas says that a compiled kernel spills from registers for Hopper."""
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(found.asm["ptx"])
        command = [get_ptxas(90).path, "-v", f"--gpu-name={sm_arch_from_capability(90)}", source]
        done = subprocess.run(
            [*command, "-o", Path(folder) / "kernel.cubin"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    said = re.search(r"(\d+) bytes spill stores", done.stderr)
    assert said is not None
    return int(said.group(1))


def compile_gluon(
    dim: int,
    mask_args: MaskArgs = RULES,
    *,
    blocks: tuple[int, int] | None = None,
    varlen: str = "",
    page_size: int | None = None,
    value_dim: int | None = None,
    softcap: float | None = None,
    alibi: bool = False,
    causal: bool = True,
    sharing: tuple[int, int] | None = None,
) -> Any:
    """The Gluon prefill kernel for bfloat16 heads of `dim`, as the launcher cuts it.

    Args:
        blocks: with block lists, heads of a tile and parts of a tile of keys.
        varlen: "packed" sequences, or "kv_lens"; page_size: slots of a page, with kv_lens.
        sharing: heads of a tile and splits of the keys.
    """
    from saccade.ops.attention.nvidia.gluon.prefill.kernel import forward_kernel
    from saccade.ops.attention.nvidia.gluon.prefill.launch import (
        constants,
        measured_launch,
        options,
    )
    from saccade.ops.attention.nvidia.gluon.prefill.seqlen_info import VarlenInfo
    from saccade.ops.attention.nvidia.gluon.prefill.support import tile_dim

    def strided(heads: int, dim: int = dim, dtype: torch.dtype = torch.bfloat16) -> StridedTensor:
        x = torch.empty(1, heads, 8192, dim, dtype=dtype, device="meta")
        return StridedTensor(x, *x.stride()[:3])

    masked = blocks or mask_args.window or softcap or alibi or sharing
    varied = varlen and (page_size or not sharing)
    launch = measured_launch(dim, "varlen" if varied else "masked" if masked else "")
    out_type = torch.bfloat16
    if sharing:
        out_type = torch.float32
        launch = replace(launch, pack=sharing[0], splits=sharing[1], direct_store=True)
    elif blocks:
        pack, parts = blocks
        direct = launch.direct_store or pack > 1
        launch = replace(launch, pack=pack, parts=parts, direct_store=direct)
    value_dim = value_dim or dim
    numbers = torch.empty(64, dtype=torch.int32, device="meta")
    info = VarlenInfo(q_tiles=numbers) if varlen == "packed" else VarlenInfo()
    if varlen == "kv_lens":
        info = VarlenInfo(numbers.to(torch.int64), numbers, 16, None, numbers, 64)
        info = info if page_size else info._replace(page_table=None, page_table_stride=None)
    lists = torch.empty(1, 8, 64, 64, dtype=torch.int32, device="meta")
    arguments: dict[str, Any] = {
        "q": strided(32), "k": strided(8), "v": strided(8, value_dim),
        "out": strided(32, value_dim, out_type),
        "lse": torch.empty(1, 32, 8192, device="meta"), "sink_logits": None, "softcap": softcap,
        "alibi_slopes": torch.empty(1, 32, device="meta") if alibi else None,
        "alibi_slopes_batch": 32 if alibi else None, "mask_args": mask_args,
        "block_lists": BlockLists(lists, lists, 0, 64 * 64, 64) if blocks else BlockLists(),
        "varlen": info, "num_pages": 64, "ZERO_V_TAIL": bool(varlen), "PAGE_SIZE": page_size,
        "scale": 0.1, "q_len": 8192, "k_len": 8192, "q_offset": 0, "batch": 1, "heads": 32,
        "groups": 4, "num_q_tiles": 64, "heads_per_section": 32, "num_work_tiles": 2048,
        "splits": 4, "out_split": 32 * 8192 * dim, "lse_split": 32 * 8192,
        "CAUSAL": causal, "DIM": dim, "V_DIM": value_dim,
        "D": tile_dim(dim), "DV": tile_dim(value_dim),
    }  # fmt: skip
    return compile_for(
        forward_kernel,
        options=options(launch.consumers),
        source=GluonASTSource,
        **arguments,
        **constants(launch),
    )


def compile_quantized_decode(format_k: str, format_v: str, dim: int, k_block: int = 0) -> Any:
    """The Gluon quantized decode kernel, one bfloat16 query, causal, as the launcher cuts it.

    Args:
        k_block: keys of a block that is selected; 0: all keys are read.
    """
    from saccade.ops.attention.nvidia.gluon.quantized_decode.kernel import quantized_decode_kernel
    from saccade.ops.attention.nvidia.gluon.quantized_decode.launch import LAUNCHES, options
    from saccade.ops.gpu.kernel_args import SeqlenInfo

    def strided(heads: int, rows: int, width: int, dtype: torch.dtype) -> StridedTensor:
        x = torch.empty(1, heads, rows, width, dtype=dtype, device="meta")
        return StridedTensor(x, *x.stride()[:3])

    def quantized(form: str, qparams: StridedTensor) -> QuantizedStrided:
        width = dim // 2 if form == "int4" else dim
        return QuantizedStrided(strided(8, 8192, width, torch.uint8), qparams, qparams)

    mask_args, lists = RULES, BlockLists()
    if k_block:
        tiles, counts = torch.empty(2, 8, 1, 128, dtype=torch.int32, device="meta")
        lists = BlockLists(tiles, counts, 1024, 128, 128)
    if k_block % 64:
        allowed = torch.empty(1, 8, 1, 8192 // k_block, dtype=torch.bool, device="meta")
        mask_args = RULES._replace(
            block_mask=allowed, block_mask_batch=0, block_mask_head=allowed.stride(1),
            block_mask_row=0, q_block=k_block, k_block=k_block,
        )  # fmt: skip
    arguments: dict[str, Any] = {
        "q": strided(32, 1, dim, torch.bfloat16),
        "k": quantized(format_k, strided(8, 128, dim, torch.float16)),
        "v": quantized(format_v, strided(8, 8192, dim // 64, torch.float16)),
        "out": strided(32, 1, dim, torch.float32), "lse": torch.empty(33, 32, 1, device="meta"),
        "seqlen_info": SeqlenInfo(), "mask_args": mask_args, "block_lists": lists,
        "sink_logits": None, "scale": 0.1,
        "q_len": 1, "k_len": 8192, "q_offset": 8191, "out_split": 32 * dim, "lse_split": 32,
        "KV_HEADS": 8, "GROUPS": 4, "D": dim, "K_FORMAT": format_k, "V_FORMAT": format_v, 
        "K_GROUP": 64,
        "V_GROUPS": dim // 64, "CAUSAL": True, "PDL": True,
    }  # fmt: skip
    how = {k: x for k, x in options(LAUNCHES[str(dim)]).items() if k != "launch_pdl"}
    return compile_for(quantized_decode_kernel, options=how, source=GluonASTSource, **arguments)


def compile_decode(dim: int, page_size: int, rows: int = 4) -> Any:
    """The Gluon decode kernel, one bfloat16 query, causal, as the launcher cuts it."""
    from saccade.ops.attention.nvidia.gluon.decode.kernel import decode_kernel
    from saccade.ops.attention.nvidia.gluon.decode.launch import LAUNCHES, options
    from saccade.ops.gpu.kernel_args import SeqlenInfo

    def strided(*shape: int, dtype: torch.dtype = torch.bfloat16) -> StridedTensor:
        x = torch.empty(*shape, dtype=dtype, device="meta")
        return StridedTensor(x, *x.stride()[:3])

    launch, keys, pages = LAUNCHES[f"{dim}/split_kv"], strided(1, 8, 8192, dim), PageTable()
    if page_size:
        keys = strided(512, 8, page_size, dim)._replace(batch=0)
        table = torch.empty(1, 512, dtype=torch.int32, device="meta")
        pages = PageTable(table, 512, 0, 8 * page_size * dim, 8 * page_size * dim)
    arguments: dict[str, Any] = {
        "q": strided(1, 32, 1, dim), "k": keys, "v": keys, "pages": pages,
        "out": strided(16, 32, 1, dim, dtype=torch.float32),
        "lse": torch.empty(16, 1, 32, device="meta"), "seqlen_info": SeqlenInfo(),
        "mask_args": RULES, "sink_logits": None, "scale": 0.1, "q_len": 1, "k_len": 8192,
        "q_offset": 8191, "out_split": 32 * dim, "lse_split": 32, "KV_HEADS": 8, "GROUPS": 4,
        "D": dim, "K_STRIDE": 2 * dim, "V_STRIDE": 2 * dim, "PAGE_SIZE": page_size,
        "K_LEN_IS_MAX": True,
        "CAUSAL": True, "WARPS": launch.warps, "STAGES": launch.stages, "ROWS": rows,
    }  # fmt: skip
    return compile_for(decode_kernel, options=options(launch), source=GluonASTSource, **arguments)


def compile_gluon_backward(dim: int, mask_args: MaskArgs = RULES, *, causal: bool = True) -> Any:
    """The Gluon gradients for bfloat16 heads of `dim`, as the launcher cuts them."""
    from saccade.ops.attention.nvidia.gluon.backward.kernel import backward_kernel
    from saccade.ops.attention.nvidia.gluon.backward.launch import (
        constants,
        measured_launch,
        options,
    )

    def strided(heads: int, dim: int = dim) -> StridedTensor:
        x = torch.empty(1, heads, 8192, dim, dtype=torch.bfloat16, device="meta")
        return StridedTensor(x, *x.stride()[:3])

    numbers = torch.empty(32 * 256, 64, device="meta")
    return compile_for(
        backward_kernel,
        options=options(2),
        source=GluonASTSource,
        **{
            "q": strided(32),
            "dout": strided(32),
            "lse_delta": numbers,
            "dq_accum": numbers,
            "mask_args": mask_args,
        },
        **{name: strided(8) for name in ("k", "v", "dk", "dv")},
        **{"scale": 0.1, "q_len": 8192, "k_len": 8192, "q_offset": 0, "batch": 1},
        **{"num_splits": 8, "groups": 4, "gqa_splits": 1, "splits_per_section": 2},
        **{"CAUSAL": causal, "D": dim},
        **constants(measured_launch(dim)),
    )


def compile_gluon_fp8(dim: int) -> Any:
    """The fp8 Gluon kernel for heads of `dim`, causal, as the launcher cuts it."""
    from saccade.ops.attention.nvidia.gluon.fp8.kernel import forward_kernel
    from saccade.ops.attention.nvidia.gluon.fp8.launch import constants, measured_launch, options

    def strided(heads: int, *rows: int, dtype: torch.dtype = torch.float8_e4m3fn) -> StridedTensor:
        x = torch.empty(1, heads, *rows, dtype=dtype, device="meta")
        return StridedTensor(x, *x.stride()[:3])

    arguments: dict[str, Any] = {
        "q": strided(32, 8192, dim), "k": strided(8, 8192, dim), "v": strided(8, dim, 8192),
        "out": strided(32, 8192, dim, dtype=torch.bfloat16),
        "lse": torch.empty(1, 32, 8192, device="meta"), "sink_logits": None, "mask_args": RULES,
        "block_lists": BlockLists(),
        "scales": tuple(torch.empty(1, heads, device="meta") for heads in (32, 8, 8)),
        "scale": 0.1, "q_len": 8192, "k_len": 8192, "k_padded": 8192, "q_offset": 0, "batch": 1,
        "heads": 32, "groups": 4, "num_q_tiles": 64, "heads_per_section": 32,
        "num_work_tiles": 2048, "CAUSAL": True, "D": dim,
    }  # fmt: skip
    return compile_for(
        forward_kernel,
        options=options(2),
        source=GluonASTSource,
        **arguments,
        **constants(measured_launch(dim)),
    )
