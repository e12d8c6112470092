"""Layers of a model computed by `ops.gemv` where a step of decoding has one row.

transformers writes a decoder layer as seven products and some ten small kernels.  In a step of
batch 1 queries, keys and values are one product here, gate and up are one with their activation,
and the addition behind attention goes together with the norm after it.  Only `nn.Linear` itself and
classes of the allowlist are replaced, and outside such steps they compute what they did before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers.activations import SiLUActivation

from saccade.hf.allowlist import kind_of
from saccade.hf.deferred_rope import deferring_forward
from saccade.hf.fused_norms import norm_forward, steps
from saccade.ops import gemv

Forward = Callable[..., Any]
Enabled = Callable[[], bool]
"""Whether the run in force wants fused layers."""


def fused_forwards(model: nn.Module, enabled: Enabled) -> list[tuple[nn.Module, Forward]]:
    """(module, what replaces its forward) for every module that fused kernels may compute.

    These are norms, linear layers, gated MLPs and decoder layers; and attention modules, whose
    RoPE is deferred to the cache.
    """
    found: dict[nn.Module, Forward] = {}
    for module in model.modules():  # a block comes before its parts
        if module not in found and is_untouched(module):
            found |= _of_module(module, enabled)
    return list(found.items())


def _of_module(module: Any, enabled: Enabled) -> dict[nn.Module, Forward]:
    """What replaces the forward of a module, and of linear layers in it that go together."""
    kind = kind_of(type(module))
    found: dict[nn.Module, Forward] = {}
    projections: list[Any] = [getattr(module, n, None) for n in ("q_proj", "k_proj", "v_proj")]
    if all(is_linear(linear) for linear in projections):
        found |= FusedQKV(projections, enabled).forwards()
    if is_linear(module):
        found[module] = _linear(module, enabled)
    elif is_gated(module):
        found[module] = _gated(module, enabled)
    elif is_decoder_layer(module):
        found[module] = _decoder_layer(module, enabled)
    else:
        forward = norm_forward(module, kind, enabled) or deferring_forward(module)
        found |= {} if forward is None else {module: forward}
    return found


def is_untouched(module: Any) -> bool:
    """Whether no hook and no forward of its own would be bypassed by replacing its forward."""
    hooks = module._forward_hooks or module._forward_pre_hooks
    return "forward" not in vars(module) and not hooks


def is_linear(module: Any) -> bool:
    """Whether a module is `nn.Linear` itself, not one of a quantizing or adapter library."""
    return type(module) is nn.Linear and is_untouched(module)


def is_gated(module: Any) -> bool:
    """Whether a module is down(silu(gate(x)) * up(x)), gate and up without bias."""
    if kind_of(type(module)) != "gated_mlp" or not is_untouched(module):
        return False
    linears = [module.gate_proj, module.up_proj, module.down_proj]
    plain = all(is_linear(linear) for linear in linears) and is_untouched(module.act_fn)
    unbiased = module.gate_proj.bias is None and module.up_proj.bias is None
    return plain and unbiased and type(module.act_fn) in (nn.SiLU, SiLUActivation)


def is_decoder_layer(module: Any) -> bool:
    """Whether a module is h + attend(norm(h)), then h + mlp(norm(h)), the second norm plain."""
    if kind_of(type(module)) != "decoder_layer":
        return False
    norm = module.post_attention_layernorm
    plain = kind_of(type(norm)) == "rms_norm" and is_untouched(norm)
    return plain and is_gated(module.mlp) and module.mlp.down_proj.bias is None


def _serves_row(enabled: Enabled, x: Tensor, *linears: nn.Linear) -> bool:
    return steps() and enabled() and gemv.supports(x, *(linear.weight for linear in linears))


def _linear(linear: Any, enabled: Enabled) -> Forward:
    original = linear.forward

    def forward(x: Tensor) -> Tensor:
        if not _serves_row(enabled, x, linear):
            return original(x)
        return gemv.linears(x, [linear.weight], [linear.bias])[0]

    return forward


class FusedQKV:
    """Linear layers of one input as one product: the first one called computes for all.

    The other products are kept as an attribute of the input, so they are freed with it.
    """

    def __init__(self, linears: list[nn.Linear], enabled: Enabled) -> None:
        self._linears, self._enabled = linears, enabled
        self._name = f"_saccade_products_{id(self)}"

    def forwards(self) -> dict[nn.Module, Forward]:
        """What replaces the forward of each."""
        return {
            linear: self._forward(index, linear.forward)
            for index, linear in enumerate(self._linears)
        }

    def _forward(self, index: int, original: Forward) -> Forward:
        def forward(x: Tensor) -> Tensor:
            if not _serves_row(self._enabled, x, *self._linears):
                return original(x)
            waiting = vars(x).get(self._name, {})
            if index not in waiting:
                waiting = dict(enumerate(self._products(x)))
                setattr(x, self._name, waiting)
            product = waiting.pop(index)
            if not waiting:
                delattr(x, self._name)
            return product

        return forward

    def _products(self, x: Tensor) -> list[Tensor]:
        weights = [linear.weight for linear in self._linears]
        return gemv.linears(x, weights, [linear.bias for linear in self._linears])


def _gated(mlp: Any, enabled: Enabled) -> Forward:
    original = mlp.forward

    def forward(x: Tensor) -> Tensor:
        if not _serves_row(enabled, x, mlp.gate_proj, mlp.up_proj):
            return original(x)
        return mlp.down_proj(gemv.gated_mlp(x, mlp.gate_proj.weight, mlp.up_proj.weight))

    return forward


def _decoder_layer(layer: Any, enabled: Enabled) -> Forward:
    original, norm, mlp = layer.forward, layer.post_attention_layernorm, layer.mlp
    gate, up, down = mlp.gate_proj, mlp.up_proj, mlp.down_proj

    def forward(hidden_states: Tensor, *args: Any, **options: Any) -> Any:
        if args or not _serves_row(enabled, hidden_states, gate, up):
            return original(hidden_states, *args, **options)
        normed = layer.input_layernorm(hidden_states)
        attended = layer.self_attn(hidden_states=normed, **options)[0]
        hidden_states, normed = gemv.add_rms_norm(
            hidden_states, attended, norm.weight, norm.variance_epsilon
        )
        inner = gemv.gated_mlp(normed, gate.weight, up.weight)
        return gemv.linears(inner, [down.weight], [hidden_states.view(-1)])[0]

    return forward
