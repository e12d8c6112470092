"""The smallest Gluon kernel with warp_specialize, for compute-sanitizer's racecheck.

    compute-sanitizer --tool racecheck python lab/race_warp_specialize.py

Nothing in it shares memory, and racecheck reports the same hazard as in our forward kernel: the
byte through which Triton tells worker warps what to run.  See lab/LOG_gpu_tune.md.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def _store(out, value: gl.constexpr):
    gl.store(out + value, value)


@gluon.jit
def forward_kernel(out):
    gl.warp_specialize([(_store, (out, 1)), (_store, (out, 2))], [4], [24])


out = torch.zeros(3, device="cuda")
forward_kernel[(2,)](out, num_warps=4, maxnreg=128)
torch.cuda.synchronize()
print(f"ran gluon {out.tolist()}")
