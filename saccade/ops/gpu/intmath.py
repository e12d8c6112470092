"""Integer arithmetic for launch grids.

Triton's host functions of the same names cost about 5 us a call, and a launch needs several.
"""

from __future__ import annotations


def cdiv(a: int, b: int) -> int:
    """a / b rounded up, b > 0."""
    return -(-a // b)


def next_power_of_two(n: int) -> int:
    """The smallest power of two that is at least n, n > 0."""
    return 1 << (n - 1).bit_length()


def lanes_of(count: int) -> int:
    """Elements of a program that holds `count`, one at least, in a row: a power of two.

    Each is a kernel to compile, so there is none below 512.
    """
    return max(512, next_power_of_two(count))
