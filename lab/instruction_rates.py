"""Cycles a multiprocessor's quarter is busy with one warp instruction, by the clock of the card."""

import torch
import triton
import triton.language as tl

ROUNDS, CHAINS, THREADS = 400, 16, 256

BODIES = {
    "ex2.approx.ftz.f32": "ex2.approx.ftz.f32 $0, $1;",
    "ex2.approx.f16x2": "ex2.approx.f16x2 $0, $1;",
    "cvt e4m3x2.f32": "{ .reg .b16 h; cvt.rn.satfinite.e4m3x2.f32 h, $1, $1; mov.b32 $0, {h, h}; }",
    "cvt e4m3x2.f16x2": "{ .reg .b16 h; cvt.rn.satfinite.e4m3x2.f16x2 h, $1; mov.b32 $0, {h, h}; }",
    "cvt f16x2.f32": "cvt.rn.f16x2.f32 $0, $1, $1;",
    "cvt bf16x2.f32": "cvt.rn.bf16x2.f32 $0, $1, $1;",
    "max.f32": "max.f32 $0, $1, 0f3F800001;",
    "fma.f32": "fma.rn.f32 $0, $1, 0f3F800001, 0f3F800001;",
    "lea": "mad.lo.u32 $0, $1, 2, 0x00800080;",
    "prmt": "prmt.b32 $0, $1, $1, 0x7531;",
    "ex2 + cvt e4m3x2.f32": "{ .reg .b16 h; .reg .b32 t; ex2.approx.ftz.f32 t, $1; "
    "cvt.rn.satfinite.e4m3x2.f32 h, t, $1; mov.b32 $0, {h, h}; }",
    "ex2 + cvt f16x2.f32": "{ .reg .b32 t; ex2.approx.ftz.f32 t, $1; cvt.rn.f16x2.f32 $0, t, $1; }",
}


@triton.jit
def kernel(out, BODY: tl.constexpr, ROUNDS: tl.constexpr, SIZE: tl.constexpr):
    x = (tl.arange(0, SIZE) % 7).to(tl.float32)
    begin = tl.inline_asm_elementwise(
        "mov.u64 $0, %clock64;", "=l,r", [tl.program_id(0)], tl.int64, False, 1
    )
    for _ in range(ROUNDS):
        x = tl.inline_asm_elementwise(BODY, "=r,r", [x], tl.float32, True, 1)
    kept = tl.max(x)
    end = tl.inline_asm_elementwise("mov.u64 $0, %clock64;", "=l,r", [kept], tl.int64, False, 1)
    tl.store(out + tl.program_id(0), end - begin)


for name, body in BODIES.items():
    try:
        out = torch.zeros(132, dtype=torch.int64, device="cuda")
        kernel[(132,)](out, body, ROUNDS, CHAINS * THREADS, num_warps=THREADS // 32)
        warps = THREADS // 32 / 4
        print(f"{name:24} {out.double().median().item() / (ROUNDS * CHAINS * warps):.2f}")
    except Exception as error:
        print(name, "FAILED", str(error)[:200])
