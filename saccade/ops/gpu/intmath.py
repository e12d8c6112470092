"""Whole-number arithmetic of launches.  Triton's own functions do it too, at 5 us a call: they
serve constants inside kernels, and a launch asks them eight times."""

from __future__ import annotations


def cdiv(a: int, b: int) -> int:
    """a / b rounded up, b > 0."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n, n > 0."""
    return 1 << (n - 1).bit_length()
