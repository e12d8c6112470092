"""Compile Triton and Gluon kernels for a GPU that this machine need not have."""

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
    SeqlenInfo,
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


def compile_gluon(
    dim: int,
    mask_args: MaskArgs = RULES,
    *,
    listed: bool = False,
    rows: str = "",
    page: int | None = None,
) -> Any:
    """The Gluon forward kernel for bfloat16 heads of `dim`, causal, as the launcher cuts it.

    Args:
        rows: "packed" documents or rows of their own "lengths"; page: slots of a page.
    """
    from saccade.ops.attention.nvidia.gluon.prefill.kernel import forward_kernel
    from saccade.ops.attention.nvidia.gluon.prefill.launch import (
        LAUNCHES,
        OWN_ROWS,
        TWO_CONSUMERS,
        constants,
        options,
    )
    from saccade.ops.attention.nvidia.gluon.prefill.seqlen_info import RowExtents

    def strided(heads: int) -> StridedTensor:
        x = torch.empty(1, heads, 8192, dim, dtype=torch.bfloat16, device="meta")
        return StridedTensor(x, *x.stride()[:3])

    launch = (TWO_CONSUMERS if listed or mask_args.window else LAUNCHES)[dim]
    launch = OWN_ROWS[dim] if rows else launch
    numbers = torch.empty(64, dtype=torch.int32, device="meta")
    row_extents = RowExtents(documents=numbers) if rows == "packed" else RowExtents()
    if rows == "lengths":
        row_extents = RowExtents(numbers.to(torch.int64), numbers, 16, None, numbers, 64)
        row_extents = row_extents if page else row_extents._replace(pages=None, pages_row=None)
    lists = torch.empty(1, 8, 64, 64, dtype=torch.int32, device="meta")
    block_lists = BlockLists(lists, lists, 0, 64 * 64, 64) if listed else BlockLists()
    arguments: dict[str, Any] = {
        "q": strided(32), "k": strided(8), "v": strided(8), "out": strided(32),
        "lse": torch.empty(1, 32, 8192, device="meta"), "sink_logits": None, "mask_args": mask_args,
        "block_lists": block_lists, "row_extents": row_extents, "pages": 64, "TAILS": bool(rows), "PAGE": page,
        "scale": 0.1, "q_len": 8192, "k_len": 8192, "q_offset": 0, "batch": 1, "heads": 32,
        "groups": 4, "tiles": 64, "section": 32, "num_work": 2048, "CAUSAL": True, "D": dim,
    }  # fmt: skip
    return compile_for(
        forward_kernel,
        options=options(launch),
        source=GluonASTSource,
        **arguments,
        **constants(launch),
    )


def compile_codes(kind_k: str, kind_v: str, dim: int) -> Any:
    """The Gluon kernel for codes, one bfloat16 query, causal, as the launcher cuts it."""
    from saccade.ops.attention.nvidia.gluon.quantized_decode.kernel import codes_kernel
    from saccade.ops.attention.nvidia.gluon.quantized_decode.launch import LAUNCH, options

    def strided(heads: int, rows: int, width: int, dtype: torch.dtype) -> StridedTensor:
        x = torch.empty(1, heads, rows, width, dtype=dtype, device="meta")
        return StridedTensor(x, *x.stride()[:3])

    def quantized(kind: str, numbers: StridedTensor) -> QuantizedStrided:
        width = dim // 2 if kind == "int4" else dim
        return QuantizedStrided(strided(8, 8192, width, torch.uint8), numbers, numbers)

    arguments: dict[str, Any] = {
        "q": strided(32, 1, dim, torch.bfloat16),
        "k": quantized(kind_k, strided(8, 128, dim, torch.float16)),
        "v": quantized(kind_v, strided(8, 8192, dim // 64, torch.float16)),
        "out": strided(32, 1, dim, torch.float32), "lse": torch.empty(33, 32, 1, device="meta"),
        "seqlen_info": SeqlenInfo(), "mask_args": RULES, "sink_logits": None, "scale": 0.1, "q_len": 1,
        "k_len": 8192, "q_offset": 8191, "out_split": 32 * dim, "lse_split": 32, "KV_HEADS": 8,
        "GROUPS": 4, "D": dim, "K_FORMAT": kind_k, "V_FORMAT": kind_v, "K_GROUP": 64,
        "V_GROUPS": dim // 64, "CAUSAL": True, "PDL": True,
    }  # fmt: skip
    how = {name: value for name, value in options(LAUNCH).items() if name != "launch_pdl"}
    return compile_for(codes_kernel, options=how, source=GluonASTSource, **arguments)


def compile_decode(dim: int, page: int, held: int = 4) -> Any:
    """The Gluon kernel for few queries, one bfloat16 query, causal, as the launcher cuts it."""
    from saccade.ops.attention.nvidia.gluon.decode.kernel import decode_kernel
    from saccade.ops.attention.nvidia.gluon.decode.launch import SHARED, options

    def strided(*shape: int, dtype: torch.dtype = torch.bfloat16) -> StridedTensor:
        x = torch.empty(*shape, dtype=dtype, device="meta")
        return StridedTensor(x, *x.stride()[:3])

    launch, keys, pages = SHARED[dim], strided(1, 8, 8192, dim), PageTable()
    if page:
        keys = strided(512, 8, page, dim)._replace(batch=0)
        table = torch.empty(1, 512, dtype=torch.int32, device="meta")
        pages = PageTable(table, 512, 0, 8 * page * dim, 8 * page * dim)
    arguments: dict[str, Any] = {
        "q": strided(1, 32, 1, dim), "k": keys, "v": keys, "pages": pages, "seqlen_info": SeqlenInfo(),
        "out": strided(16, 32, 1, dim, dtype=torch.float32), "mask_args": RULES, "sink_logits": None,
        "lse": torch.empty(16, 1, 32, device="meta"), "scale": 0.1, "q_len": 1, "k_len": 8192,
        "q_offset": 8191, "out_split": 32 * dim, "lse_split": 32, "KV_HEADS": 8,
        "GROUPS": 4, "D": dim, "K_STEP": 2 * dim, "V_STEP": 2 * dim, "PAGE": page, "LONGEST": True,
        "CAUSAL": True,
        "WARPS": launch.warps, "STAGES": launch.stages, "HELD": held,
    }  # fmt: skip
    return compile_for(decode_kernel, options=options(launch), source=GluonASTSource, **arguments)


def compile_gluon_backward(dim: int, mask_args: MaskArgs = RULES, *, causal: bool = True) -> Any:
    """The Gluon gradients for bfloat16 heads of `dim`, as the launcher cuts them."""
    from saccade.ops.attention.nvidia.gluon.backward.kernel import backward_kernel
    from saccade.ops.attention.nvidia.gluon.backward.launch import LAUNCHES, constants, options

    def strided(heads: int) -> StridedTensor:
        x = torch.empty(1, heads, 8192, dim, dtype=torch.bfloat16, device="meta")
        return StridedTensor(x, *x.stride()[:3])

    numbers = torch.empty(32 * 256, 64, device="meta")
    return compile_for(
        backward_kernel,
        options=options(),
        source=GluonASTSource,
        **{
            "q": strided(32),
            "dout": strided(32),
            "stats": numbers,
            "dq": numbers,
            "mask_args": mask_args,
        },
        **{name: strided(8) for name in ("k", "v", "dk", "dv")},
        **{"scale": 0.1, "q_len": 8192, "k_len": 8192, "q_offset": 0, "batch": 1, "shares": 8},
        **{"groups": 4, "splits": 1, "section": 2, "CAUSAL": causal, "D": dim},
        **constants(LAUNCHES[dim]),
    )


def compile_gluon_fp8(dim: int) -> Any:
    """The fp8 Gluon kernel for heads of `dim`, causal, as the launcher cuts it."""
    from saccade.ops.attention.nvidia.gluon.fp8.kernel import forward_kernel
    from saccade.ops.attention.nvidia.gluon.fp8.launch import CONSTANTS, OPTIONS

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
        "heads": 32, "groups": 4, "tiles": 64, "section": 32, "num_work": 2048, "CAUSAL": True,
        "D": dim,
    }  # fmt: skip
    return compile_for(
        forward_kernel, options=OPTIONS, source=GluonASTSource, **arguments, **CONSTANTS
    )
