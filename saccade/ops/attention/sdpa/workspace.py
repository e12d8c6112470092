"""What PyTorch's CPU attention kernel allocates for itself, measured by running it once.

A plan runs on tensors without memory, where these buffers are not allocated; and their sizes are
internal to ATen (FlashAttentionKernel.cpp), so no formula here copies them.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch
from torch import Tensor
from torch.autograd import profiler_legacy

_LONGEST = 1024
"""Rows and keys of a probe: the kernel's tiles no longer grow there."""


def kernel_bytes(q: Tensor, k: Tensor) -> int:
    """Bytes that the kernel takes beside its results on q `[B, H, Lq, D]` and k `[B, Hkv, Lk, D]`.

    They hold one tile for each of torch's threads, so one head of up to 1024 rows and keys has
    the same ones.  `q` and `k` may be fake: their shapes and dtype count.
    """
    rows, keys = (min(x.shape[2], _LONGEST) for x in (q, k))
    return _measured(q.dtype, rows, keys, q.shape[3], torch.get_num_threads())


@cache
def _measured(dtype: torch.dtype, rows: int, keys: int, dim: int, threads: int) -> int:
    """The same, from a thread of its own, where no mode or profiler of the caller is active."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(_allocated, dtype, rows, keys, dim, threads).result()


def _allocated(dtype: torch.dtype, rows: int, keys: int, dim: int, threads: int) -> int:
    torch.set_num_threads(threads)  # the calling thread's number is not inherited
    q, k = (torch.zeros(1, 1, length, dim, dtype=dtype) for length in (rows, keys))
    # torch.profiler would print to stderr, and allows no second profiler beside the caller's.
    profile = profiler_legacy.profile(profile_memory=True)
    with profile:
        results = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, k)
    events = profile.function_events
    assert events is not None, "the profiler fills them in when it ends"
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in events)
    return allocated - sum(x.nbytes for x in results)
