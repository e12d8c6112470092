"""Small Gluon kernels with warp_specialize, for compute-sanitizer's racecheck.

    compute-sanitizer --tool racecheck python lab/race_warp_specialize.py plain|uneven|barriers|both

Nothing in them goes through shared memory but the byte by which Triton tells worker warps what to
run.  `uneven` has a worker of four warps and one of one, so that warps are left idle; in `barriers`
each part synchronises its own warps a few times.  See lab/LOG_gpu_tune.md for what was found.
"""

import sys

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def _store(out, value: gl.constexpr, BARRIERS: gl.constexpr):
    for i in range(BARRIERS):
        gl.thread_barrier()
        gl.store(out + value, value + i)
    gl.store(out + value, value)


@gluon.jit
def even_kernel(out, BARRIERS: gl.constexpr):
    gl.warp_specialize([(_store, (out, 1, BARRIERS)), (_store, (out, 2, BARRIERS))], [4], [24])


@gluon.jit
def uneven_kernel(out, BARRIERS: gl.constexpr):
    gl.warp_specialize(
        [
            (_store, (out, 1, BARRIERS)),
            (_store, (out, 2, BARRIERS)),
            (_store, (out, 3, BARRIERS)),
        ],
        [4, 1],
        [24, 24],
    )


VARIANTS = {
    "plain": (even_kernel, 0),
    "uneven": (uneven_kernel, 0),
    "barriers": (even_kernel, 5),
    "both": (uneven_kernel, 5),
}

if __name__ == "__main__":
    import torch

    kernel, barriers = VARIANTS[sys.argv[1]]
    out = torch.zeros(4, device="cuda")
    for _ in range(3):
        kernel[(4,)](out, barriers, num_warps=4, maxnreg=128)
    torch.cuda.synchronize()
    print(f"ran gluon {sys.argv[1]} {out.tolist()}")
