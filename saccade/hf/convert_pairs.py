"""Which dimensions of a key its rotary positions turn together, and what may be done to them.

A pair that is rotated is one complex number, and multiplying it by another one commutes with every
position.  Dimensions that are not rotated may be mixed freely among themselves.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.hf.key_rotation import KeyRotation


@dataclass(frozen=True, slots=True)
class Pairs:
    """Rotated pairs and the dimensions that are not rotated.

    Attributes:
        first, second: real and imaginary dimension of each pair, `[pairs]`.
        rest: dimensions that no position changes.
    """

    first: Tensor
    second: Tensor
    rest: Tensor

    @classmethod
    def of(cls, rotation: KeyRotation, head_dim: int) -> Pairs:
        """The pairs of a layer with that rotation."""
        count = len(rotation.inv_freq)
        if rotation.interleaved:
            first = rotation.first + 2 * torch.arange(count)
            second = first + 1
        else:
            first = rotation.first + torch.arange(count)
            second = first + count
        used = set(first.tolist()) | set(second.tolist())
        return cls(first, second, torch.tensor([d for d in range(head_dim) if d not in used]))

    def blocks(self) -> list[Complex | Real]:
        """What may be mixed: each pair for itself, and the rest together."""
        found: list[Complex | Real] = []
        if len(self.first):
            found.append(Complex(self.first, self.second))
        if len(self.rest):
            found.append(Real(self.rest))
        return found


@dataclass(frozen=True, slots=True)
class Complex:
    """Rotated pairs, each a complex number that is mixed with the same pair of other heads."""

    first: Tensor
    second: Tensor

    def take(self, rows: Tensor) -> Tensor:
        """`[heads, pairs, 1, inputs]` complex of rows `[heads, D, inputs]`."""
        return torch.complex(rows[:, self.first], rows[:, self.second])[:, :, None]

    def put(self, rows: Tensor, values: Tensor) -> None:
        """Write what `take` gave."""
        rows[:, self.first] = values[:, :, 0].real.to(rows.dtype)
        rows[:, self.second] = values[:, :, 0].imag.to(rows.dtype)

    def draw(self, heads: int, random: torch.Generator, *, only_signs: bool) -> Tensor:
        """Random numbers other than 0, or signs, `[heads, pairs, 1, 1]` complex."""
        shape = (heads, len(self.first), 1, 1)
        angle = torch.rand(shape, generator=random, dtype=torch.float64)
        if only_signs:
            return torch.complex(1 - 2 * (angle < 0.5).double(), torch.zeros_like(angle))
        size = 0.5 + torch.rand(shape, generator=random, dtype=torch.float64)
        return torch.polar(size, angle * 2 * torch.pi)

    def moments(self, m: Tensor) -> Tensor:
        """E[z conj(z')] `[pairs, group, 1, group, 1]` of real moments `[group, D, group, D]`."""
        a, b = self.first, self.second
        rr, ii, ir, ri = m[:, a, :, a], m[:, b, :, b], m[:, b, :, a], m[:, a, :, b]
        return torch.complex(rr + ii, ir - ri)[:, :, None, :, None]

    def weights(self, w: Tensor) -> Tensor:
        """E|q|^2 `[pairs, group, 1, 1]` of moments within heads `[group, D, D]`."""
        size = (w[:, self.first, self.first] + w[:, self.second, self.second]).T
        return torch.complex(size, torch.zeros_like(size))[:, :, None, None]


@dataclass(frozen=True, slots=True)
class Real:
    """Dimensions that are not rotated, mixed freely."""

    dims: Tensor

    def take(self, rows: Tensor) -> Tensor:
        """`[heads, 1, n, inputs]` of rows `[heads, D, inputs]`."""
        return rows[:, self.dims][:, None]

    def put(self, rows: Tensor, values: Tensor) -> None:
        """Write what `take` gave."""
        rows[:, self.dims] = values[:, 0].to(rows.dtype)

    def draw(self, heads: int, random: torch.Generator, *, only_signs: bool) -> Tensor:
        """Random invertible maps, or signs, `[heads, 1, n, n]`."""
        n = len(self.dims)
        if only_signs:
            signs = torch.randint(0, 2, (heads, 1, n), generator=random) * 2.0 - 1
            return torch.diag_embed(signs.double())
        return invertible(heads, n, random)[:, None]

    def moments(self, m: Tensor) -> Tensor:
        """`[1, group, n, group, n]` of moments `[group, D, group, D]`."""
        return m[:, self.dims][:, :, :, self.dims][None]

    def weights(self, w: Tensor) -> Tensor:
        """`[1, group, n, n]` of moments within heads `[group, D, D]`."""
        return w[:, self.dims][:, :, self.dims][None]


def invertible(heads: int, n: int, random: torch.Generator) -> Tensor:
    """Random maps `[heads, n, n]` float64 that are far from singular."""
    square = torch.randn(heads, n, n, generator=random, dtype=torch.float64)
    return torch.linalg.qr(square).Q * (
        0.5 + torch.rand(heads, n, 1, generator=random, dtype=torch.float64)
    )
