"""How a model rotates its keys, found by asking the model instead of guessing from its class.

Rotary positions come in many forms: halves or neighbouring pairs, all of a head, its first or its
last dimensions, forwards or backwards, other frequencies in each layer type, or none at all.  The
model reads the same single tokens at two positions.  A single token attends to itself alone, so the
keys of a layer then differ by its rotation and by nothing else: the form that turns the ones into
the others, to rounding, is that of the layer.  Where none does, cached keys cannot be moved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Final, NamedTuple

import torch
from torch import Tensor

from saccade.core import Unsupported
from saccade.rope import shift_keys

_FAR: Final = 997
_ROWS: Final = 4


class Cached(NamedTuple):
    """Keys and values `[B, H, t, D]` that one layer gave to its cache."""

    k: Tensor
    v: Tensor


ReadKeys = Callable[[Tensor, Tensor | None], Sequence[Cached]]
"""(tokens `[B, t]`, positions `[B, t]` or None for 0, 1, ..) -> what each layer cached."""


@dataclass(frozen=True, slots=True, eq=False)
class KeyRotation:
    """The rotation of one layer's keys; called, it moves cached keys by a number of positions.

    Attributes:
        inv_freq: radians per position, float64 `[R/2]`; empty where positions change no key.
        first: the first dimension of a head that is rotated.
        interleaved: pairs are neighbours instead of halves.
        sign: -1 for a model that rotates backwards.
    """

    inv_freq: Tensor
    first: int = 0
    interleaved: bool = False
    sign: int = 1

    def __call__(self, k: Tensor, delta: int | Tensor) -> Tensor:
        """Cached keys `[B, Hkv, n, D]` moved by `delta` positions, as a new tensor.

        `delta` may be a number of positions for each key, int64 `[n]` or `[B, n]`.
        """
        if not len(self.inv_freq):
            return k.clone()
        before, rotated = k[..., : self.first], k[..., self.first :]
        steps = self.sign * delta
        moved = shift_keys(rotated, self.inv_freq, steps, interleaved=self.interleaved)
        return torch.cat((before, moved), dim=-1) if self.first else moved


def find_rotations(
    read: ReadKeys, frequencies: Sequence[Tensor], *, vocab_size: int, longest: int
) -> list[KeyRotation]:
    """The rotation of every layer's keys.

    Args:
        read: runs the model on tokens, without changing anything.
        frequencies: float64 `[R/2]` each, all that any layer may use.
        vocab_size: of the model; longest: positions it can be asked for.

    Raises:
        Unsupported: a layer whose keys are moved by none of the known rotations.
    """
    tokens = torch.linspace(1, vocab_size - 1, _ROWS, dtype=torch.float64).long()[:, None]
    near, far = 1, max(2, min(_FAR, longest - 1))
    asked = {at: read(tokens, torch.full_like(tokens, at)) for at in (0, near, far)}
    found: list[KeyRotation] = []
    for layer, start in enumerate(asked[0]):
        others = {at: cached[layer] for at, cached in asked.items() if at}
        found.append(_rotation(layer, start, others, frequencies))
    _check_counted(read, tokens, found)
    return found


def _rotation(
    layer: int, start: Cached, others: Mapping[int, Cached], frequencies: Sequence[Tensor]
) -> KeyRotation:
    if all(_same(other.v, start.v) for other in others.values()):
        for rotation in _forms(frequencies, start.k.shape[-1]):
            if all(_same(rotation(start.k, at), other.k) for at, other in others.items()):
                return rotation
    raise Unsupported(
        f"cached keys cannot be moved: the keys of layer {layer} do not follow from those of other "
        "positions by a rotation that is known here. Leave n_keep unset, and start a new context "
        "where this one is full."
    )


def _forms(frequencies: Sequence[Tensor], head_dim: int) -> Iterator[KeyRotation]:
    """Every way in which keys of that size may be rotated; those that do not turn them first."""
    yield KeyRotation(torch.zeros(0, dtype=torch.float64))
    for inv_freq, interleaved, sign in product(frequencies, (False, True), (1, -1)):
        unrotated = head_dim - 2 * len(inv_freq)
        for first in sorted({0, unrotated}) if unrotated >= 0 else ():
            yield KeyRotation(inv_freq, first, interleaved, sign)


def _same(found: Tensor, expected: Tensor) -> bool:
    """Whether two tensors differ by no more than rounding in each dimension of a head.

    In each, because a few large ones (Qwen2's biases) would hide wrong pairs among the others.
    """
    full = expected.dtype in (torch.float32, torch.float64)
    own, shared = (1e-3, 1e-4) if full else (2e-2, 4e-3)
    gap = (found.float() - expected.float()).square().sum((0, 1, 2)).sqrt()
    size = expected.float().square().sum((0, 1, 2)).sqrt()
    return bool((gap <= own * size + shared * size.norm()).all())


def _check_counted(read: ReadKeys, tokens: Tensor, found: Sequence[KeyRotation]) -> None:
    """Raise where the model counts positions itself, and what it was told made no difference.

    The keys of the first layer depend on their own token alone, so it is enough to compare those.
    """
    twice = read(tokens.repeat(1, 2), None)[0]
    k, v = twice.k, twice.v
    if not (_same(found[0](k[:, :, :1], 1), k[:, :, 1:]) and _same(v[:, :, :1], v[:, :, 1:])):
        raise Unsupported(
            "cached keys cannot be moved: this model does not take the positions it is given. "
            "Leave n_keep unset, and start a new context where this one is full."
        )
