"""What stands in for a rotary module of transformers under scaling options.

Changing `config.rope_parameters` of a loaded model does nothing: the frequencies are buffers of its
rotary modules.  A ScaledRotary computes the tables of another rule in float64 and returns them as
the module does.  How the module does is asked, not guessed: under the rule of its own config the
ScaledRotary has to return what the module returns, or the model's positions are not scaled.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

from saccade.core import Unsupported
from saccade.hf.foreign_errors import is_of_the_device
from saccade.hf.rope_tables import pristine, reached, reaching
from saccade.rope import (
    DynamicNTK,
    Frequencies,
    LongRoPE,
    ParsedRope,
    Rule,
    inverse_frequencies,
    tables,
)
from saccade.runtime.params import ContextParams
from saccade.runtime.rope_options import configured_ropes, depends_on_length, scaled

SCALED_TYPE: Final = "full_attention"
"""The layer type whose positions are scaled where each type has its own; the others attend only to
a window, which is shorter than the trained length."""

Layout = Callable[[Tensor, Tensor], Any]

_LAYOUTS: Final[Mapping[str, Layout]] = {
    "half": lambda cos, sin: (cos, sin),
    "halves": lambda cos, sin: (torch.cat((cos, cos), dim=-1), torch.cat((sin, sin), dim=-1)),
    "neighbours": lambda cos, sin: (cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1)),
    "complex": lambda cos, sin: torch.complex(cos.float(), sin.float()),
}
"""From cos and sin `[.., R/2]` to what rotary modules return."""


class ScaledRotary:
    """cos and sin of scaled positions; the same call and the same layout as the module's forward.

    Args:
        ropes: base and scaling rule of each layer type; one entry under None where all agree.
        pairs: number of rotated pairs of each layer type.
        layout: one of `_LAYOUTS`.
        joins_rows: of positions `[3, B, L]` (time, height and width of pictures) the module makes
            one table; here that is done for text alone, whose three rows are equal.

    Attributes:
        positions: those of the last call.
    """

    def __init__(
        self,
        ropes: dict[str | None, ParsedRope],
        pairs: dict[str | None, int],
        layout: str,
        *,
        joins_rows: bool = False,
    ) -> None:
        self.ropes, self.pairs, self.layout = ropes, pairs, layout
        self.joins_rows = joins_rows
        self.positions: Tensor | None = None
        self._fixed = {kind: self.frequencies(kind) for kind in ropes}
        self._latest: dict[str | None, tuple[Hashable, Frequencies]] = {}  # with what they are for

    def frequencies(self, kind: str | None = None, seq_len: int | None = None) -> Frequencies:
        """Frequencies of a layer type for a sequence of that length."""
        rope, dim = self.ropes[kind], 2 * self.pairs[kind]
        return inverse_frequencies(rope.rule, base=rope.base, rotary_dim=dim, seq_len=seq_len)

    @property
    def follows_length(self) -> bool:
        """Whether any table changes with the length of the text."""
        return any(depends_on_length(rope.rule) for rope in self.ropes.values())

    @torch.no_grad()
    def __call__(self, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> Any:
        """cos and sin for positions `[B, L]`, in the dtype of x; complex numbers are float32.

        Raises:
            Unsupported: positions of pictures, for a module that joins rows.
        """
        kind = layer_type if layer_type in self.ropes else None
        if self.joins_rows and position_ids.ndim == 3:
            position_ids = _of_text(position_ids)
        self.positions, length = position_ids, None
        if depends_on_length(self.ropes[kind].rule):
            length = reached()
            length = int(position_ids.max()) + 1 if length is None else length
        found = self._frequencies_on(x.device, kind, length)
        dtype = torch.float32 if self.layout == "complex" else x.dtype
        cos, sin = tables(
            found.inv_freq, position_ids.to(x.device), found.attention_factor, dtype=dtype
        )
        return _LAYOUTS[self.layout](cos, sin)

    def _frequencies_on(
        self, device: torch.device, kind: str | None, length: int | None
    ) -> Frequencies:
        """`frequencies`, kept on the device: a CUDA graph holds no copy from the host."""
        key = device, None if length is None else _table_key(self.ropes[kind].rule, length)
        before = None if torch.compiler.is_compiling() else self._latest.get(kind)
        if before is not None and before[0] == key:
            return before[1]
        found = self._fixed[kind] if length is None else self.frequencies(kind, length)
        found = found._replace(inv_freq=found.inv_freq.to(device))
        if not torch.compiler.is_compiling():
            self._latest[kind] = key, found
        return found

    def table_key(self, length: int) -> Hashable:
        """Equal for two lengths that have the same tables."""
        return tuple(_table_key(rope.rule, length) for rope in self.ropes.values())


def _of_text(position_ids: Tensor) -> Tensor:
    """The one row `[B, L]` of three equal ones."""
    # A row that was expanded equals itself: looking would wait for the GPU.
    if position_ids.stride(0) and not bool((position_ids == position_ids[:1]).all()):
        raise Unsupported(
            "scaled positions are those of text, but this model was given other ones for the time, "
            "height and width of pictures. Leave rope_* and yarn_* unset where it reads pictures."
        )
    return position_ids[0]


def _table_key(rule: Rule, length: int) -> Hashable:
    if isinstance(rule, DynamicNTK):
        return max(length, rule.original_max_position)
    return isinstance(rule, LongRoPE) and length > rule.original_max_position


def scaled_rotary(module: nn.Module, config: Any, params: ContextParams) -> ScaledRotary:
    """What stands in for a rotary module under these params.

    Raises:
        Unsupported: a module that does not compute what its config says.
        ValueError: options that do not fit, or rope parameters that are not known here.
    """
    stated = configured_ropes(config, only_known=True)  # _layout finds what other keys change
    pairs = {kind: n for kind in stated if (n := _num_pairs(module, kind))}
    ropes = {kind: stated[kind] for kind in pairs}
    if not ropes.keys() & {None, SCALED_TYPE}:
        raise _unknown(module, f"it has no frequencies of {SCALED_TYPE} layers")
    joins_rows = _joins_rows(module, next(iter(ropes)))
    layout = _layout(module, ropes, pairs, joins_rows)
    changed = {
        kind: scaled(rope, params, config) if kind in (None, SCALED_TYPE) else rope
        for kind, rope in ropes.items()
    }
    return ScaledRotary(changed, pairs, layout, joins_rows=joins_rows)


def _num_pairs(module: nn.Module, kind: str | None) -> int:
    """Pairs that layers of that type rotate; 0 where the model has no such layers."""
    buffer = getattr(module, "inv_freq" if kind is None else f"{kind}_inv_freq", None)
    return buffer.numel() if isinstance(buffer, Tensor) else 0


def _layout(
    module: nn.Module,
    ropes: dict[str | None, ParsedRope],
    pairs: dict[str | None, int],
    joins_rows: bool,
) -> str:
    """The layout in which the rules of the config give what the module returns."""
    for layout in _LAYOUTS:
        own = ScaledRotary(ropes, pairs, layout, joins_rows=joins_rows)
        if all(_agrees(module, own, kind) for kind in ropes):
            return layout
    raise _unknown(module, "it does not return the tables that follow from its rope_parameters")


@torch.no_grad()
def _joins_rows(module: nn.Module, kind: str | None) -> bool:
    """Whether a module makes one table of three rows of positions."""
    x, at = _question(module)
    answer = _parts(reaching(None, _asked, pristine(module), x, at.expand(3, -1, -1), kind))
    return bool(answer) and answer[0].shape[:-1] == at.shape


@torch.no_grad()
def _agrees(module: nn.Module, own: ScaledRotary, kind: str | None) -> bool:
    """Whether both return the same for some positions."""
    x, at = _question(module)
    asked = [at, at.expand(3, -1, -1)] if own.joins_rows else [at]
    answers = [reaching(None, _asked, _unrounded(module, own), x, p, kind) for p in asked]
    theirs = [part for answer in answers for part in _parts(answer)]
    ours = [part for p in asked for part in _parts(reaching(None, own, x, p, kind))]
    return len(theirs) == len(ours) and all(
        a.shape == b.shape and a.is_complex() == b.is_complex() and bool((a - b).abs().max() < 1e-4)
        for a, b in zip(theirs, ours, strict=True)
    )


def _unrounded(module: nn.Module, own: ScaledRotary) -> nn.Module:
    """A copy as it was built; `model.to(torch.bfloat16)` rounds frequencies, which is undone."""
    fresh = pristine(module)
    for kind in own.ropes:
        name = "inv_freq" if kind is None else f"{kind}_inv_freq"
        held, exact = fresh._buffers[name], own.frequencies(kind).inv_freq.float()
        if held is None or held.dtype.itemsize >= 4 or held.shape != exact.shape:
            continue
        exact = exact.to(held.device)
        if torch.allclose(held.float(), exact, rtol=torch.finfo(held.dtype).eps, atol=1e-7):
            fresh._buffers[name] = exact
    return fresh


def _question(module: nn.Module) -> tuple[Tensor, Tensor]:
    """Something for a rotary module to take the dtype of, and positions `[1, L]`."""
    device = next(module.buffers()).device
    at = torch.tensor([[0, 1, 2, 7, 30]], device=device)
    return torch.zeros(1, 1, 1, device=device), at


def _asked(fresh: nn.Module, x: Tensor, at: Tensor, kind: str | None) -> Any:
    """What a copy, which the call may change, returns for positions; nothing if it refuses."""
    try:
        return fresh(x, at) if kind is None else fresh(x, at, kind)
    except (RuntimeError, IndexError, ValueError) as error:
        if is_of_the_device(error):
            raise
        return ()


def _parts(answer: Any) -> tuple[Tensor, ...]:
    return answer if isinstance(answer, tuple) else (answer,)


def _unknown(module: nn.Module, why: str) -> Unsupported:
    return Unsupported(
        f"the positions of {type(module).__name__} cannot be scaled here: {why}. Leave rope_* and "
        "yarn_* unset for this model."
    )
