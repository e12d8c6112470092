"""How quantized tiles get from a warp's shared memory (see producer.py) into registers."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from saccade.ops.attention.nvidia.gluon.ptx.async_copy import warp_sync
from saccade.ops.attention.nvidia.gluon.ptx.convert import bf16x2_to_f16x2, mul_f16x2
from saccade.ops.attention.nvidia.gluon.ptx.memory import ld_global, ld_shared, zero_shared_16


@gluon.jit
def ld_global_strided(gmem, FIRST: gl.constexpr, STEP: gl.constexpr, COUNT: gl.constexpr,
                      VEC: gl.constexpr):  # fmt: skip
    """VEC registers at each of COUNT places STEP bytes apart, in order."""
    found = ld_global(gmem, FIRST, VEC)
    for i in gl.static_range(1, COUNT):
        found += ld_global(gmem, FIRST + i * STEP, VEC)
    return found


@gluon.jit
def load_q_fragments(gmem, D: gl.constexpr, FORMAT: gl.constexpr, DTYPE: gl.constexpr):
    """A lane's channels of its query row as f16x2: D / 8 of each half, those of int4's upper / 16.

    The upper four bits of a byte are read as sixteen times the integer.
    """
    HALF: gl.constexpr = D  # bytes
    COUNT: gl.constexpr = D // 64
    regs = ld_global_strided(gmem, 0, 16, COUNT, 4) + ld_global_strided(gmem, HALF, 16, COUNT, 4)
    found = ()
    for i in gl.static_range(D // 8):
        x = bf16x2_to_f16x2(regs[i]) if DTYPE == gl.bfloat16 else regs[i]
        if FORMAT == "int4" and i >= D // 16:
            x = mul_f16x2(x, gl.full(x.shape, 0x2C002C00, gl.int32, x.type.layout))
        found += (x,)
    return found


@gluon.jit
def ld_swizzled(smem, AT: gl.constexpr, SWIZZLE: gl.constexpr, VEC: gl.constexpr):
    """VEC registers at AT bytes from `smem`, whose address bits SWIZZLE are swizzled."""
    return ld_shared(smem ^ (AT & SWIZZLE), AT - (AT & SWIZZLE), VEC)


@gluon.jit
def load_k(smem, ROW: gl.constexpr, D: gl.constexpr):
    """D / 32 registers of each half of eight keys: [key][half][reg], or [key][reg] for int4."""
    found = ()
    for key in gl.static_range(8):
        for half in gl.static_range(2 if ROW == D else 1):
            found += ld_swizzled(smem, key * ROW + half * (D // 2), 64, D // 32)
    return found


@gluon.jit
def load_v(smem, ROW: gl.constexpr, D: gl.constexpr):
    """D / 64 registers of each half of sixteen values, in the same order."""
    found = ()
    for key in gl.static_range(16):
        for half in gl.static_range(2 if ROW == D else 1):
            found += ld_swizzled(smem, key * ROW + half * (D // 2), 96, D // 64)
    return found


@gluon.jit
def load_k_qparams(smem, D: gl.constexpr):
    """Scales or offsets of a lane's channels as f16x2, D / 8 of each half."""
    found = ld_shared(smem, 0, 4)
    if D == 128:
        found += ld_shared(smem, 16, 4)
    found += ld_shared(smem, D, 4)
    if D == 128:
        found += ld_shared(smem, D + 16, 4)
    return found


@gluon.jit
def load_v_qparams(smem, V_GROUPS: gl.constexpr):
    """Scales or offsets of a lane's sixteen values as f16x2: two values, or a value's groups."""
    found = ld_shared(smem, 0, 4) + ld_shared(smem, 16, 4)
    if V_GROUPS == 2:
        found += ld_shared(smem, 32, 4)
        found += ld_shared(smem, 48, 4)
    return found


@gluon.jit
def zero_past_end(qparams, k_first, k_len, V_GROUPS: gl.constexpr):
    """Scales or offsets of values k_first .. k_first + 15, zeros from `k_len` on."""
    kept = ()
    for i in gl.static_range(8 * V_GROUPS):
        if V_GROUPS == 2:
            keep = gl.where(k_first + i < k_len, -1, 0)
        else:
            keep = gl.where(k_first + 2 * i < k_len, 0xFFFF, 0)
            keep = keep | gl.where(k_first + 2 * i + 1 < k_len, -65536, 0)
        kept += (qparams[i] & keep,)
    return kept


@gluon.jit
def zero_v_rows(smem, lane, num_valid, ROW: gl.constexpr):
    """Zero quantized values from row `num_valid` of a tile on: fp8 numbers there might be nan."""
    for half in gl.static_range(2):
        row = lane + 32 * half
        for n in gl.static_range(ROW // 16):
            at = (row * ROW + 16 * n) ^ (32 * (row // 16 % 4))
            zero_shared_16(smem + at, (row >= num_valid).to(gl.int32))
    warp_sync(lane)
