"""Compile a Triton kernel for a GPU that is not there."""

from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from saccade.ops.tiles import Plane, Rules, Visits

RULES = Rules()
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
    torch.float8_e4m3fn: "*fp8e4nv",
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
    dim: int, rules: Rules = RULES, *, listed: bool = False, rows: str = "", page: int | None = None
) -> Any:
    """The Gluon forward kernel for bfloat16 heads of `dim`, causal, as the launcher cuts it.

    Args:
        rows: "packed" documents or rows of their own "lengths"; page: slots of a page.
    """
    from saccade.ops.attend.gluon.extents import Extents
    from saccade.ops.attend.gluon.forward import forward_kernel
    from saccade.ops.attend.gluon.launch import (
        LAUNCHES,
        OWN_ROWS,
        TWO_CONSUMERS,
        constants,
        options,
    )

    def plane(heads: int) -> Plane:
        x = torch.empty(1, heads, 8192, dim, dtype=torch.bfloat16, device="meta")
        return Plane(x, *x.stride()[:3])

    launch = (TWO_CONSUMERS if listed or rules.window else LAUNCHES)[dim]
    launch = OWN_ROWS[dim] if rows else launch
    numbers = torch.empty(64, dtype=torch.int32, device="meta")
    extents = Extents(documents=numbers) if rows == "packed" else Extents()
    if rows == "lengths":
        extents = Extents(numbers.to(torch.int64), numbers, 16, None, numbers, 64)
        extents = extents if page else extents._replace(pages=None, pages_row=None)
    lists = torch.empty(1, 8, 64, 64, dtype=torch.int32, device="meta")
    visits = Visits(lists, lists, 0, 64 * 64, 64) if listed else Visits()
    arguments: dict[str, Any] = {
        "q": plane(32), "k": plane(8), "v": plane(8), "out": plane(32),
        "lse": torch.empty(1, 32, 8192, device="meta"), "sink_logits": None, "rules": rules,
        "visits": visits, "extents": extents, "pages": 64, "TAILS": bool(rows), "PAGE": page,
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
    from saccade.ops.attend.gluon.codes_kernel import codes_kernel
    from saccade.ops.attend.gluon.codes_launch import LAUNCH, options
    from saccade.ops.attend.triton.quantized import Coded
    from saccade.ops.tiles import Bounds

    def plane(heads: int, rows: int, width: int, dtype: torch.dtype) -> Plane:
        x = torch.empty(1, heads, rows, width, dtype=dtype, device="meta")
        return Plane(x, *x.stride()[:3])

    def codes(kind: str, numbers: Plane) -> Coded:
        width = dim // 2 if kind == "int4" else dim
        return Coded(plane(8, 8192, width, torch.uint8), numbers, numbers)

    arguments: dict[str, Any] = {
        "q": plane(32, 1, dim, torch.bfloat16),
        "k": codes(kind_k, plane(8, 128, dim, torch.float16)),
        "v": codes(kind_v, plane(8, 8192, dim // 64, torch.float16)),
        "out": plane(32, 1, dim, torch.float32), "lse": torch.empty(33, 32, 1, device="meta"),
        "bounds": Bounds(), "rules": RULES, "sink_logits": None, "scale": 0.1, "q_len": 1,
        "k_len": 8192, "q_offset": 8191, "out_split": 32 * dim, "lse_split": 32, "KV_HEADS": 8,
        "GROUPS": 4, "D": dim, "K_FORMAT": kind_k, "V_FORMAT": kind_v, "K_GROUP": 64,
        "V_GROUPS": dim // 64, "CAUSAL": True, "EARLY": True,
    }  # fmt: skip
    how = {name: value for name, value in options(LAUNCH).items() if name != "launch_pdl"}
    return compile_for(codes_kernel, options=how, source=GluonASTSource, **arguments)


def compile_decode(dim: int, page: int, held: int = 4) -> Any:
    """The Gluon kernel for few queries, one bfloat16 query, causal, as the launcher cuts it."""
    from saccade.ops.attend.gluon.decode_kernel import decode_kernel
    from saccade.ops.attend.gluon.decode_launch import SHARED, options
    from saccade.ops.attend.triton.decode import Pages
    from saccade.ops.tiles import Bounds

    def plane(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Plane:
        x = torch.empty(*shape, dtype=dtype, device="meta")
        return Plane(x, *x.stride()[:3])

    launch, keys, pages = SHARED[dim], plane(1, 8, 8192, dim), Pages()
    if page:
        keys = plane(512, 8, page, dim)._replace(batch=0)
        table = torch.empty(1, 512, dtype=torch.int32, device="meta")
        pages = Pages(table, 512, 0, 8 * page * dim, 8 * page * dim)
    arguments: dict[str, Any] = {
        "q": plane(1, 32, 1, dim), "k": keys, "v": keys, "pages": pages, "bounds": Bounds(),
        "out": plane(16, 32, 1, dim, dtype=torch.float32), "rules": RULES, "sink_logits": None,
        "lse": torch.empty(16, 1, 32, device="meta"), "scale": 0.1, "q_len": 1, "k_len": 8192,
        "q_offset": 8191, "out_split": 32 * dim, "lse_split": 32, "KV_HEADS": 8,
        "GROUPS": 4, "D": dim, "K_STEP": 2 * dim, "V_STEP": 2 * dim, "PAGE": page, "LONGEST": True,
        "CAUSAL": True,
        "WARPS": launch.warps, "STAGES": launch.stages, "HELD": held,
    }  # fmt: skip
    return compile_for(decode_kernel, options=options(launch), source=GluonASTSource, **arguments)


def compile_gluon_backward(dim: int, rules: Rules = RULES, *, causal: bool = True) -> Any:
    """The Gluon gradients for bfloat16 heads of `dim`, as the launcher cuts them."""
    from saccade.ops.attend.gluon.backward import backward_kernel
    from saccade.ops.attend.gluon.backward_launch import LAUNCHES, constants, options

    def plane(heads: int) -> Plane:
        x = torch.empty(1, heads, 8192, dim, dtype=torch.bfloat16, device="meta")
        return Plane(x, *x.stride()[:3])

    numbers = torch.empty(32 * 256, 64, device="meta")
    return compile_for(
        backward_kernel,
        options=options(),
        source=GluonASTSource,
        **{"q": plane(32), "dout": plane(32), "stats": numbers, "dq": numbers, "rules": rules},
        **{name: plane(8) for name in ("k", "v", "dk", "dv")},
        **{"scale": 0.1, "q_len": 8192, "k_len": 8192, "q_offset": 0, "batch": 1, "shares": 8},
        **{"groups": 4, "splits": 1, "section": 2, "CAUSAL": causal, "D": dim},
        **constants(LAUNCHES[dim]),
    )


def compile_gluon_fp8(dim: int) -> Any:
    """The fp8 Gluon kernel for heads of `dim`, causal, as the launcher cuts it."""
    from saccade.ops.attend.gluon.fp8_forward import forward_kernel
    from saccade.ops.attend.gluon.fp8_launch import CONSTANTS, OPTIONS

    def plane(heads: int, *rows: int, dtype: torch.dtype = torch.float8_e4m3fn) -> Plane:
        x = torch.empty(1, heads, *rows, dtype=dtype, device="meta")
        return Plane(x, *x.stride()[:3])

    arguments: dict[str, Any] = {
        "q": plane(32, 8192, dim), "k": plane(8, 8192, dim), "v": plane(8, dim, 8192),
        "out": plane(32, 8192, dim, dtype=torch.bfloat16),
        "lse": torch.empty(1, 32, 8192, device="meta"), "sink_logits": None, "rules": RULES,
        "visits": Visits(),
        "scales": tuple(torch.empty(1, heads, device="meta") for heads in (32, 8, 8)),
        "scale": 0.1, "q_len": 8192, "k_len": 8192, "k_padded": 8192, "q_offset": 0, "batch": 1,
        "heads": 32, "groups": 4, "tiles": 64, "section": 32, "num_work": 2048, "CAUSAL": True,
        "D": dim,
    }  # fmt: skip
    return compile_for(
        forward_kernel, options=OPTIONS, source=GluonASTSource, **arguments, **CONSTANTS
    )
