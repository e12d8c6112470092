"""Who watches a call: a compiler, a tracer, a dispatch mode, a tensor subclass or torch.func.

Kernels of our own write to memory that PyTorch does not see them write to.  What watches operators
(torch.compile, torch.export, make_fx, FakeTensorMode, a tensor subclass) would record or return
memory that was never filled, so it has to be shown an operator instead.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import (  # there is no public way
    _get_current_dispatch_mode,  # type: ignore[attr-defined]
)


def is_watched(parts: Iterable[object]) -> bool:
    """Whether an operator must be visible to anybody."""
    return torch.compiler.is_compiling() or is_intercepted(parts)


def is_intercepted(parts: Iterable[object]) -> bool:
    """Whether a dispatch mode or a tensor subclass stands between the operators and memory."""
    tensors = [x for x in parts if isinstance(x, Tensor)]
    if any(type(x) not in (Tensor, Parameter) for x in tensors):
        return True
    if torch.compiler.is_compiling():
        return False
    return _get_current_dispatch_mode() is not None or any(map(is_transformed, tensors))


def is_recorded(x: Tensor) -> bool:
    """Whether values of a tensor cannot be read: a graph is made that holds for others too."""
    if torch.compiler.is_compiling() or x.is_meta:
        return True
    return _get_current_dispatch_mode() is not None


def is_transformed(x: Tensor) -> bool:
    """Whether a transformation of torch.func wraps a tensor: it has no memory of its own.

    Autograd's is_grads_batched wraps gradients in the same way, by an older class.
    """
    functorch = torch._C._functorch  # type: ignore[attr-defined]
    return functorch.is_functorch_wrapped_tensor(x) or functorch.is_legacy_batchedtensor(x)
