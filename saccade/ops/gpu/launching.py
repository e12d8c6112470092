"""What launchers of kernels share: strided tensors, the device, PDL options, TMA."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from saccade.core.formats import QuantizedTensor
from saccade.ops.gpu.kernel_args import QuantizedStrided, StridedTensor


def strided(x: Tensor) -> StridedTensor:
    """Pointer and strides; a dimension of size 1 is broadcast."""
    batch, head, row = (0 if x.shape[i] == 1 else x.stride(i) for i in (0, 1, 2))
    return StridedTensor(x, batch, head, row)


def quantized_strided(x: QuantizedTensor, *, as_bytes: bool = False) -> QuantizedStrided:
    """Pointers and strides of quantized data, scales and offsets.

    Args:
        as_bytes: present the data as uint8, whatever its dtype.
    """
    qdata, scale, offset = (unit_rows(part) for part in x)
    qdata = qdata.view(torch.uint8) if as_bytes else qdata
    return QuantizedStrided(strided(qdata), strided(scale), strided(offset))


def tma_strided(x: Tensor) -> StridedTensor:
    """Pointer and strides as TMA needs them: multiples of 16 bytes, none of them 0."""
    steps = (x.stride(i) if x.shape[i] > 1 else x.shape[3] for i in (0, 1, 2))
    return StridedTensor(x, *steps)


def unit_rows(x: Tensor) -> Tensor:
    """`x`, copied where its last stride is not 1."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def float32(x: Tensor | None) -> Tensor | None:
    """Contiguous float32 without gradient, as kernels read per-head parameters."""
    return None if x is None else x.detach().to(torch.float32).contiguous()


def on(device: torch.device) -> AbstractContextManager[object]:
    """The device a kernel has to be launched on."""
    if device.type != "cuda" or device.index in (None, torch.cuda.current_device()):
        return nullcontext()
    return torch.cuda.device(device)


def pdl_options(device: torch.device) -> dict[str, bool]:
    """Launch options for programmatic dependent launch (PDL), on Hopper and later.

    A kernel launched with them may start before the preceding kernel has ended, so it has to wait
    (griddepcontrol.wait) before it touches that kernel's results.
    """
    supported = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    return {"PDL": True, "launch_pdl": True} if supported else {"PDL": False}


def tma_loadable(*tensors: Tensor) -> bool:
    """Whether TMA can load all: 16-bit rows of at most 256, aligned to 16 bytes, not broadcast."""
    for x in tensors:
        size = x.element_size()
        steps = (x.data_ptr(), *(x.stride(i) * size for i in (0, 1, 2)))
        aligned = all(step % 16 == 0 for step in steps) and x.stride(2) > 0
        if size != 2 or not aligned or x.shape[3] > 256 or x.shape[2] == 0:
            return False
    return True


def tma_aligned(x: Tensor) -> bool:
    """Unit last stride, and every other step a positive multiple of 16 bytes."""
    return aligned(x, 16) and all(x.stride(i) > 0 for i in range(3) if x.shape[i] > 1)


def aligned(x: Tensor, step: int) -> bool:
    """Unit last stride, and all others multiples of `step` bytes."""
    steps = [x.stride(i) * x.element_size() for i in range(3) if x.shape[i] > 1]
    return x.stride(3) == 1 and x.data_ptr() % step == 0 and all(s % step == 0 for s in steps)


def set_tma_allocator() -> None:
    """Register the allocator for TMA descriptors that kernels make on the device."""
    import triton

    triton.set_allocator(_descriptor_memory)


def _descriptor_memory(size: int, alignment: int, stream: int | None) -> Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")
