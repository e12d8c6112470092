"""Loads from and stores to global and shared memory, and shared memory itself.

`gmem` and `smem` are byte addresses, one a thread.
"""

from __future__ import annotations

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@triton.constexpr_function
def _load_asm(space, vec, offset):
    size = "" if vec == 1 else f".v{vec}"
    found = ", ".join(f"${i}" for i in range(vec))
    found = found if vec == 1 else f"{{{found}}}"
    return f"ld.{space}{size}.b32 {found}, [${vec} + {offset}];"


@triton.constexpr_function
def _load_constraints(vec, address):
    return "=r," * vec + address


@gluon.jit
def _load(address, ASM: gl.constexpr, CONSTRAINTS: gl.constexpr, VEC: gl.constexpr):
    """The VEC registers (1, 2 or 4) that an instruction loads."""
    if VEC == 4:
        found = gl.inline_asm_elementwise(
            ASM, CONSTRAINTS, [address], (gl.int32, gl.int32, gl.int32, gl.int32), False, 1
        )
    elif VEC == 2:
        found = gl.inline_asm_elementwise(
            ASM, CONSTRAINTS, [address], (gl.int32, gl.int32), False, 1
        )
    else:
        found = (gl.inline_asm_elementwise(ASM, CONSTRAINTS, [address], gl.int32, False, 1),)
    return found


@gluon.jit
def ld_global(gmem, OFFSET: gl.constexpr, VEC: gl.constexpr):
    """VEC registers (1, 2 or 4) of each thread from `gmem` + OFFSET bytes, read-only data."""
    asm: gl.constexpr = _load_asm("global.nc", VEC, OFFSET)
    constraints: gl.constexpr = _load_constraints(VEC, "l")
    return _load(gmem, asm, constraints, VEC)


@gluon.jit
def ld_shared(smem, OFFSET: gl.constexpr, VEC: gl.constexpr):
    """VEC registers (1, 2 or 4) of each thread from shared memory at `smem` + OFFSET bytes."""
    asm: gl.constexpr = _load_asm("shared", VEC, OFFSET)
    constraints: gl.constexpr = _load_constraints(VEC, "r")
    return _load(smem, asm, constraints, VEC)


@triton.constexpr_function
def _ld_shared_f32_asm(offset):
    return f"ld.shared.f32 $0, [$1 + {offset}];"


@gluon.jit
def ld_shared_f32(smem, OFFSET: gl.constexpr):
    """A float32 of each thread from shared memory at `smem` + OFFSET bytes."""
    asm: gl.constexpr = _ld_shared_f32_asm(OFFSET)
    return gl.inline_asm_elementwise(asm, "=f,r", [smem], gl.float32, False, 1)


@triton.constexpr_function
def _st_shared_f32_asm(offset):
    return f"st.shared.f32 [$1 + {offset}], $2; mov.u32 $0, 0;"


@gluon.jit
def st_shared_f32(smem, x, OFFSET: gl.constexpr):
    """Store a float32 of each thread to shared memory at `smem` + OFFSET bytes."""
    asm: gl.constexpr = _st_shared_f32_asm(OFFSET)
    gl.inline_asm_elementwise(asm, "=r,r,f", [smem, x], gl.int32, False, 1)


@gluon.jit
def zero_shared_16(smem, predicate):
    """Store 16 bytes of zeros to shared memory for each thread whose `predicate` is not 0."""
    gl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .b32 z; mov.b32 z, 0; setp.ne.s32 p, $2, 0;"
        " @p st.shared.v4.b32 [$1], {z, z, z, z}; mov.b32 $0, z; }",
        "=r,r,r",
        [smem, predicate],
        gl.int32,
        False,
        1,
    )


@triton.constexpr_function
def _st_global_asm(vec):
    values = ", ".join(f"${i + 3}" for i in range(vec))
    return (
        "{ .reg .pred p; setp.ne.s32 p, $2, 0;"
        f" @p st.global.v{vec}.b32 [$1], {{{values}}}; mov.b32 $0, 0; }}"
    )


@gluon.jit
def st_global(gmem, values, predicate):
    """Store two or four registers side by side, for each thread whose `predicate` is not 0."""
    asm: gl.constexpr = _st_global_asm(len(values))
    if len(values) == 4:
        args = [gmem, predicate, values[0], values[1], values[2], values[3]]
        gl.inline_asm_elementwise(asm, "=r,l,r,r,r,r,r", args, gl.int32, False, 1)
    else:
        args = [gmem, predicate, values[0], values[1]]
        gl.inline_asm_elementwise(asm, "=r,l,r,r,r", args, gl.int32, False, 1)


@triton.constexpr_function
def _static_smem_asm(size):
    return f"{{ .shared .align 128 .b8 own[{size}]; mov.u32 $0, own; }}"


@gluon.jit
def static_shared_memory(thread, SIZE: gl.constexpr):
    """Address of SIZE bytes of statically allocated shared memory, at most 48 KiB."""
    asm: gl.constexpr = _static_smem_asm(SIZE)
    return gl.inline_asm_elementwise(asm, "=r,r", [thread], gl.int32, True, 1)


@gluon.jit
def dynamic_shared_memory(thread, never, UNITS: gl.constexpr):
    """Address (a multiple of 128) of UNITS x 4 bytes a thread, allocated when the kernel starts.

    Args:
        never: a condition that is always false; without a store behind it the compiler would drop
            the allocation.
    """
    LAYOUT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    smem = gl.allocate_shared_memory(gl.int32, [UNITS + 1, thread.shape[0]], LAYOUT)
    if never:
        smem.index(0).store(thread)
    return gl.inline_asm_elementwise(
        "{ .reg .b32 at; mov.u32 at, global_smem; add.u32 at, at, 127; and.b32 $0, at, -128; }",
        "=r,r", [thread], gl.int32, False, 1,
    )  # fmt: skip
