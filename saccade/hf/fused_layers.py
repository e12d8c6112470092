"""Layers of a model computed by `ops.one_row` where a step of decoding has one row.

transformers writes a decoder layer as seven products and some ten small kernels.  In a step of
batch 1 queries, keys and values are one product here, gate and up are one with their activation,
and the addition behind attention goes together with the norm after it.  Only modules that an
example shows to be plain are replaced, and they compute everything but such steps as they did.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.ops import gemv
from saccade.runtime.step import in_step

Forward = Callable[..., Any]


def one_row_forwards(
    model: nn.Module, norms: Sequence[nn.Module]
) -> list[tuple[nn.Module, Forward]]:
    """(module, what replaces its forward) for linear maps, gated MLPs and whole decoder layers.

    Args:
        norms: modules known to be plain RMS norms.
    """
    plain_norms = {id(norm) for norm in norms}
    found: dict[nn.Module, Forward] = {}
    for module in model.modules():  # a block comes before its parts
        if module in found:
            continue
        if _plain(module):
            found[module] = _linear(module)
        elif _untouched(module):
            found |= _of_block(module, plain_norms)
    return list(found.items())


def _of_block(module: Any, plain_norms: set[int]) -> dict[nn.Module, Forward]:
    """What a block of several modules has, apart from single linear maps."""
    found: dict[nn.Module, Forward] = {}
    together = [getattr(module, name, None) for name in ("q_proj", "k_proj", "v_proj")]
    if all(_plain(linear) for linear in together):
        found |= Together(together).forwards()
    if is_gated(module):
        found[module] = _gated(module)
    elif is_decoder_layer(module, plain_norms):
        found[module] = _decoder_layer(module)
    return found


def _untouched(module: Any) -> bool:
    """Nobody replaced its forward or wants to see what goes in and out."""
    hooks = module._forward_hooks or module._forward_pre_hooks
    return "forward" not in vars(module) and not hooks


def _plain(module: Any) -> bool:
    return type(module) is nn.Linear and _untouched(module)


def _one_row(x: Tensor, *linears: nn.Module) -> bool:
    return in_step() and gemv.supports(x, *(linear.weight for linear in linears))


def _linear(module: Any) -> Forward:
    usual = module.forward

    def forward(x: Tensor) -> Tensor:
        if not _one_row(x, module):
            return usual(x)
        return gemv.linears(x, [module.weight], [module.bias])[0]

    return forward


class Together:
    """Linear maps of one input: who is asked first computes for all."""

    def __init__(self, linears: list[Any]) -> None:
        self._linears = linears
        self._x: Tensor | None = None
        self._found: dict[int, Tensor] = {}

    def forwards(self) -> dict[nn.Module, Forward]:
        """What replaces the forward of each."""
        return {
            linear: self._forward(index, linear.forward)
            for index, linear in enumerate(self._linears)
        }

    def _forward(self, index: int, usual: Forward) -> Forward:
        def forward(x: Tensor) -> Tensor:
            if not _one_row(x, *self._linears):
                return usual(x)
            if x is not self._x or index not in self._found:
                weights = [linear.weight for linear in self._linears]
                biases = [linear.bias for linear in self._linears]
                self._x = x
                self._found = dict(enumerate(gemv.linears(x, weights, biases)))
            found = self._found.pop(index)
            if not self._found:
                self._x = None
            return found

        return forward


def is_gated(module: Any) -> bool:
    """Whether a module is down(silu(gate(x)) * up(x)), gate and up without bias."""
    linears = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    if not all(_plain(linear) for linear in linears) or not hasattr(module, "act_fn"):
        return False
    plain = linears[0].bias is None and linears[1].bias is None
    return plain and _computes_gated(type(module).forward, module.act_fn)


class _Stub(SimpleNamespace):
    """Stands for a module, functions in place of its parts; transformers looks for a forward."""

    forward = None


def _computes_gated(forward: Forward, activation: Forward) -> bool:
    """An example, with functions in place of linear maps."""
    parts = {
        "gate_proj": lambda x: 2 * x + 1,
        "up_proj": lambda x: x - 3,
        "down_proj": lambda x: 5 * x + 7,
    }
    x = torch.linspace(-3, 2, 12).view(1, 2, 6)
    try:
        answer = forward(_Stub(act_fn=activation, **parts), x)
    except (AttributeError, TypeError, RuntimeError, ValueError):
        return False
    expected = 5 * (F.silu(2 * x + 1) * (x - 3)) + 7
    return isinstance(answer, Tensor) and torch.allclose(answer, expected)


def _gated(mlp: Any) -> Forward:
    usual = mlp.forward

    def forward(x: Tensor) -> Tensor:
        if not _one_row(x, mlp.gate_proj, mlp.up_proj):
            return usual(x)
        return mlp.down_proj(gemv.gated_mlp(x, mlp.gate_proj.weight, mlp.up_proj.weight))

    return forward


def is_decoder_layer(module: Any, plain_norms: set[int]) -> bool:
    """Whether a module is h + attend(norm(h)), then h + mlp(norm(h)), the second norm plain."""
    parts = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
    if not all(isinstance(getattr(module, name, None), nn.Module) for name in parts):
        return False
    plain = id(module.post_attention_layernorm) in plain_norms and is_gated(module.mlp)
    plain = plain and module.mlp.down_proj.bias is None
    return plain and _computes_layer(type(module).forward)


@cache
def _computes_layer(forward: Forward) -> bool:
    """An example, with functions in place of norms, attention and MLP."""
    passed: dict[str, Any] = {}

    def self_attn(hidden_states: Tensor, **options: Any) -> tuple[Tensor, None]:
        passed.update(options)
        return 3 * hidden_states - 2, None

    parts = {
        "input_layernorm": lambda x: 2 * x + 1,
        "post_attention_layernorm": lambda x: x * x,
        "mlp": lambda x: 5 * x + 7,
        "self_attn": self_attn,
        "gradient_checkpointing": False,
        "training": False,
    }
    x = torch.linspace(-3, 2, 12).view(1, 2, 6)
    options = {name: object() for name in ("attention_mask", "position_ids", "past_key_values",
                                           "position_embeddings", "another")}  # fmt: skip
    try:
        answer = forward(_Stub(**parts), x, use_cache=True, **options)
    except (AttributeError, TypeError, RuntimeError, ValueError):
        return False
    h = x + 3 * (2 * x + 1) - 2
    same = isinstance(answer, Tensor) and torch.allclose(answer, h + 5 * (h * h) + 7)
    return same and passed == options | {"use_cache": True}


def _decoder_layer(layer: Any) -> Forward:
    usual, norm, mlp = layer.forward, layer.post_attention_layernorm, layer.mlp
    gate, up, down = mlp.gate_proj, mlp.up_proj, mlp.down_proj

    def forward(hidden_states: Tensor, *args: Any, **options: Any) -> Any:
        if args or not _one_row(hidden_states, gate, up):
            return usual(hidden_states, *args, **options)
        normed = layer.input_layernorm(hidden_states)
        attended = layer.self_attn(hidden_states=normed, **options)[0]
        hidden_states, normed = gemv.add_rms_norm(
            hidden_states, attended, norm.weight, norm.variance_epsilon
        )
        inner = gemv.gated_mlp(normed, gate.weight, up.weight)
        return gemv.linears(inner, [down.weight], [hidden_states.view(-1)])[0]

    return forward
