"""Checks of what callers pass; each error says what was expected, what came and what to do.

Shapes, dtypes and devices are always checked: the host knows them.  Numbers in a tensor (lengths,
page numbers) are checked where they can be read at once, which is on a CPU; reading them from a GPU
would wait for it at every step of a model.
"""

from __future__ import annotations

import math
from numbers import Integral, Real

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import (  # there is no public way
    _get_current_dispatch_mode,  # type: ignore[attr-defined]
)

from saccade.core.formats import FP8

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
STORED = (*FLOATS, FP8)
"""What queries, keys and values may be."""
LAYOUT = "batch, heads, length, head_dim"
LARGEST_POSITION = 2**30
"""Positions of tokens stay below it in every kernel."""


def describe(x: object) -> str:
    """Dtype and shape of a tensor, or the type of anything else."""
    if not isinstance(x, Tensor):
        return type(x).__name__
    if x.is_nested or x.layout is not torch.strided:
        kind = "nested" if x.is_nested else str(x.layout).removeprefix("torch.")
        return f"a {kind} {_name(x.dtype)} tensor"
    return f"{_name(x.dtype)} {list(x.shape)}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def is_plain_tensor(x: object) -> bool:
    """Whether `x` is a tensor of numbers at strides: neither sparse nor nested."""
    return isinstance(x, Tensor) and x.layout is torch.strided and not x.is_nested


def readable(x: Tensor) -> bool:
    """Whether the numbers of `x` can be read now, at no cost: on the CPU, and not traced."""
    if not x.is_cpu or type(x) not in (Tensor, Parameter):
        return False
    return not torch.compiler.is_compiling() and _get_current_dispatch_mode() is None


def integer(name: str, x: object, least: int | None = None, most: int | None = None) -> int:
    """`x` as an int within bounds.

    Raises:
        TypeError: no integer (a bool is none).
        ValueError: below `least` or above `most`.
    """
    if type(x) is int:
        found = x
    elif isinstance(x, bool) or not isinstance(x, (int, Integral, torch.SymInt)):
        raise TypeError(f"{name} must be an integer, got {x!r}.")
    else:
        found = int(x) if isinstance(x, Integral) and not isinstance(x, int) else x
    assert isinstance(found, (int, torch.SymInt))
    if (least is not None and found < least) or (most is not None and found > most):
        bounds = ([] if least is None else [f"at least {least}"]) + (
            [] if most is None else [f"at most {most}"]
        )
        raise ValueError(f"{name} must be {' and '.join(bounds)}, got {short(found)}.")
    return found  # type: ignore[return-value]


def short(x: object) -> str:
    """`x` as text for an error; a number of many digits by its size."""
    if isinstance(x, int) and abs(x) >= 10**30:
        return f"a number of {x.bit_length()} bits"
    return str(x)


def number(name: str, x: object) -> float:
    """`x` as a finite float.

    Raises:
        TypeError: no number (a bool is none).
        ValueError: infinite or not a number.
    """
    if isinstance(x, torch.SymFloat):
        return x  # type: ignore[return-value]
    if type(x) is float and -math.inf < x < math.inf:  # torch 2.11 does not compile math.isfinite
        return x
    if isinstance(x, Tensor) and x.numel() == 1 and not x.requires_grad and not x.is_complex():
        x = x.item()
    if isinstance(x, bool) or not isinstance(x, (int, float, Real)):
        raise TypeError(f"{name} must be a number without a gradient, got {describe(x)}.")
    try:
        found = float(x)
    except OverflowError:
        found = math.inf
    if not math.isfinite(found):
        raise ValueError(f"{name} must be finite, got {short(x)}.")
    return found


def truth(name: str, x: object) -> bool:
    """`x`, which has to be a bool.

    Raises:
        TypeError: anything else.
    """
    if not isinstance(x, bool):
        raise TypeError(f"{name} must be True or False, got {x!r}.")
    return x


def check_tensor(name: str, x: object, dtypes: tuple[torch.dtype, ...], axes: str) -> Tensor:
    """`x`, a tensor of one of the dtypes with the dimensions that `axes` names by commas.

    Raises:
        TypeError: anything else.
    """
    good = is_plain_tensor(x) and x.dtype in dtypes and x.ndim == axes.count(",") + 1  # type: ignore[attr-defined]
    if not good:
        kind = "floating-point" if FLOATS[0] in dtypes else " or ".join(map(_name, dtypes))
        raise TypeError(f"{name} must be a {kind} tensor [{axes}], got {describe(x)}.")
    assert isinstance(x, Tensor)
    return x


def check_device(name: str, x: Tensor, device: torch.device) -> None:
    """Raise ValueError unless `x` lies on `device`."""
    if x.device != device:
        raise ValueError(f"{name} must be on {device} like the other tensors, got {x.device}.")


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise TypeError or ValueError unless q, k, v fit together as attention inputs."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, x, STORED, LAYOUT)
        if x.device != q.device:
            raise ValueError(f"q, k and v must share a device, got {q.device} and {x.device}.")
    in_fp8 = [x.dtype == FP8 for x in (q, k, v)]
    if any(in_fp8) and not all(in_fp8):
        raise TypeError(
            "q, k and v must all be float8_e4m3fn or none of them, got "
            f"{', '.join(_name(x.dtype) for x in (q, k, v))}. "
            "Quantize all three with saccade.quantize_fp8_per_head."
        )
    check_kv(k, v, 3)
    check_heads(q, k.shape[0], k.shape[1], k.shape[3])


def check_kv(k: Tensor, v: Tensor, shared: int, what: str = "batch, heads and length") -> None:
    """Raise ValueError unless k and v share their first dimensions and have channels."""
    keys, values = k.shape, v.shape
    if keys != values and keys[:shared] != values[:shared]:
        raise ValueError(f"k and v must share {what}, got k {list(keys)} and v {list(values)}.")
    if keys[-1] == 0 or values[-1] == 0:
        raise ValueError(
            "k and v must have at least one channel a head, "
            f"got k {list(keys)} and v {list(values)}."
        )


def check_heads(q: Tensor, batch: int, kv_heads: int, head_dim: int) -> None:
    """Raise ValueError unless the query heads group over KV heads of that batch and head_dim."""
    rows, heads, _, dim = q.shape
    if rows != batch:
        raise ValueError(f"q and k must share the batch, got {rows} and {batch}.")
    if dim != head_dim:
        raise ValueError(f"q and k must share head_dim, got {dim} and {head_dim}.")
    if kv_heads == 0 or heads == 0 or heads % kv_heads:
        raise ValueError(
            "the query heads must be a multiple of the key/value heads, "
            f"got {heads} and {kv_heads}."
        )


def check_exactly(
    name: str,
    x: object,
    dtypes: tuple[torch.dtype, ...],
    shape: tuple[int, ...],
    device: torch.device,
) -> None:
    """Raise ValueError unless `x` is a tensor of one of the dtypes, that shape and device."""
    if not (is_plain_tensor(x) and x.dtype in dtypes and x.shape == shape):  # type: ignore[attr-defined]
        expected = f"{' or '.join(map(_name, dtypes))} {list(shape)}"
        raise ValueError(f"{name} must be {expected}, got {describe(x)}.")
    assert isinstance(x, Tensor)
    check_device(name, x, device)


def extremes(x: Tensor) -> tuple[int, int]:
    """The smallest and the largest of some integers; a few of them are read as a list, faster."""
    if x.numel() <= 64:
        values = (x if x.ndim == 1 else x.flatten()).tolist()
        return min(values), max(values)
    low, high = torch.aminmax(x)
    return int(low), int(high)


def check_bounds(name: str, x: Tensor, least: int, most: int) -> None:
    """Raise ValueError where a number of `x` lies outside of `least` .. `most`, if readable."""
    if not readable(x) or x.numel() == 0:
        return
    low, high = extremes(x)
    if low < least or high > most:
        raise ValueError(f"{name} must be {least} to {most}, got {low if low < least else high}.")
