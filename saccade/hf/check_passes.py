"""What the self-check compares: the same few tokens through a model in several ways."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from saccade.core import Unsupported
from saccade.hf import changes
from saccade.hf.attach import attach
from saccade.hf.layers import attention_modules, text_config
from saccade.hf.model import HFModel
from saccade.hf.packed_layers import StoredLayer, StoredLinear
from saccade.hf.runs import Undo
from saccade.ops.linear import PackedWeight, product_dtype
from saccade.runtime import Context, ContextParams, Sampler
from saccade.runtime.rope_options import stretches

STEPS: Final = 4
"""Single steps after the prompt."""
ROWS: Final = 8
"""How often the effect of rounding is tried."""
SUMS: Final = 16
"""Roundings that a sum in another order may cost where no result is rounded to half precision."""

MEANT: Final = (
    ("n_swa", "n_sinks"),
    ("rope_scaling_type", "rope_freq_base", "rope_freq_scale"),
    ("yarn_ext_factor", "yarn_attn_factor", "yarn_beta_fast", "yarn_beta_slow", "yarn_orig_ctx"),
)
"""Options that change the result on purpose, which the reference therefore has too."""


@dataclass(slots=True)
class Outputs:
    """What one way gave.

    Attributes:
        logits: `[rows, n, vocab]` of the last positions.
        layers: output `[rows, t, hidden]` of each layer, by its name in the model.
        attention: output `[rows, t, hidden]` of each attention module, by the name of its layer.
    """

    logits: Tensor
    layers: dict[str, Tensor]
    attention: dict[str, Tensor]


def is_half(model: PreTrainedModel) -> bool:
    """Whether results of layers are rounded to fewer digits than sums are made with."""
    return model.dtype not in (torch.float32, torch.float64)


def rounds_products(model: PreTrainedModel) -> bool:
    """Whether products of many rows round x to bfloat16, which those of few rows do not."""
    coarser = product_dtype() is torch.bfloat16 and model.dtype is not torch.bfloat16
    return coarser and any(map(_is_packed, model.modules()))


def sample_tokens(model: PreTrainedModel, prompt: int) -> Tensor:
    """Fixed random tokens, without those that mean something special to the model."""
    config = text_config(model)
    special = {
        value
        for part in (config, model.config)
        for name, value in vars(part).items()
        if name.endswith("token_id") and isinstance(value, int)
    }
    usable = torch.tensor([t for t in range(min(config.vocab_size, 4096)) if t not in special])
    longest = getattr(config, "max_position_embeddings", None) or prompt + STEPS + 1
    # One less than the longest: transformers' dynamic tables forget a longer text only then.
    count = max(STEPS + 1, min(prompt + STEPS, longest - 1))
    at = torch.randint(len(usable), (count,), generator=torch.Generator().manual_seed(1))
    return usable[at]


def eager(model: PreTrainedModel, tokens: Tensor) -> Outputs:
    """One forward pass with the model's own attention function, without a cache.

    Raises:
        Unsupported: transformers cannot run the model on tokens alone.
    """
    try:
        with _eager_attention(model):
            return _forward(model, tokens)
    except (Unsupported, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise Unsupported(
            f"{type(model).__name__} cannot read tokens alone by its own eager attention "
            f"({type(error).__name__}), so there is nothing to compare with."
        ) from error


def reference(model: PreTrainedModel, params: ContextParams, tokens: Tensor) -> Outputs:
    """One forward pass without a cache, with the options that change the result on purpose."""
    with attach(model, ContextParams(**_meant(params), backend="reference", fused_layers=False)):
        return _forward(model, tokens)


def _meant(params: ContextParams) -> dict[str, Any]:
    """The options that change the result on purpose, those that are not at their defaults."""
    default, names = ContextParams(), list(sum(MEANT, ()))
    names += ["n_ctx"] if stretches(params) else []
    values = {name: getattr(params, name) for name in names}
    return {name: value for name, value in values.items() if value != getattr(default, name)}


def rounded_otherwise(model: PreTrainedModel, params: ContextParams, tokens: Tensor) -> Outputs:
    """What results are compared with in row 0; in ROWS more rows the same, rounded otherwise.

    Row 0 is eager attention, or the backend "reference" under options that change results.  In the
    others what every attention module gives is changed at random by what two right implementations
    may differ by, and so is what its projections give: queries and keys are rotated with more
    digits or with fewer.  Where products with packed weights round what they are given, that is
    changed, too.  How much that changes the logits depends on the model and on these options:
    behind a window of two tokens, layers amplify what they do not otherwise.
    """
    size = torch.finfo(model.dtype).eps * (1 if is_half(model) else SUMS)
    random = torch.Generator().manual_seed(1)

    def rounded(hidden: Tensor, scale: Callable[[Tensor], Tensor], size: float = size) -> Tensor:
        wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        noise = torch.rand(wide.shape, generator=random).mul_(2).sub_(1).to(wide)
        noise[0] = 0
        return (wide + size * scale(wide) * noise).to(hidden.dtype)

    def change(scale: Callable[[Tensor], Tensor], *call: Any) -> Any:
        output = call[-1]
        hidden = output if isinstance(output, Tensor) else output[0]
        if not isinstance(hidden, Tensor) or not hidden.is_floating_point():
            return None
        changed = rounded(hidden, scale)
        return changed if isinstance(output, Tensor) else (changed, *output[1:])

    def change_input(_: nn.Module, given: tuple[Any, ...]) -> Any:
        return rounded(given[0], _half, torch.finfo(torch.bfloat16).eps), *given[1:]

    options = _meant(params)
    attention = _eager_attention(model)
    if options:
        attention = attach(model, ContextParams(**options, backend="reference", fused_layers=False))
    with ExitStack() as hooks, attention:
        if rounds_products(model):
            for part in filter(_is_packed, model.modules()):
                hooks.callback(part.register_forward_pre_hook(change_input).remove)
        for _, module in attention_modules(model):
            for part in module.modules():
                scale = _rms if part is module else _half
                if part is module or _projects(part):
                    hooks.callback(part.register_forward_hook(partial(change, scale)).remove)
        return _forward(model, tokens, rows=1 + ROWS)


def _rms(hidden: Tensor) -> Tensor:
    return hidden.square().mean(-1, keepdim=True).sqrt()


def _half(hidden: Tensor) -> Tensor:
    """What rounding one number may cost is half of the distance to the next."""
    return hidden.abs() / 2


def _is_packed(module: nn.Module) -> bool:
    return isinstance(module, StoredLinear) and isinstance(module.packed, PackedWeight)


def _projects(module: nn.Module) -> bool:
    if isinstance(module, StoredLayer):  # whose weight is made anew when it is asked for
        return True
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() == 2


@contextmanager
def _eager_attention(model: PreTrainedModel) -> Iterator[None]:
    undo = Undo()
    try:
        changes.set_implementation(undo, model, "eager")
        yield
    finally:
        undo.run()


@torch.inference_mode()
def _forward(model: PreTrainedModel, tokens: Tensor, *, rows: int = 1) -> Outputs:
    """One forward pass of equal rows without a cache."""
    batch = tokens.expand(rows, -1).to(model.device)
    with _recorded(model) as recorded:
        output = model(input_ids=batch, use_cache=False)
    if getattr(output, "logits", None) is None:
        raise Unsupported(f"{type(model).__name__} gives no logits that could be compared.")
    return Outputs(_on_host(output.logits[:, -STEPS - 1 :]), *map(_joined, recorded))


def in_context(model: HFModel, params: ContextParams, tokens: Tensor) -> Outputs:
    """The same tokens through a Context: a prompt in chunks, then single steps.

    All logits from the end of the prompt on, or those after the last step alone.
    """
    sampler = _Forced(tokens[-STEPS:].tolist())
    with Context(model, params) as ctx:
        with _recorded(model.model) as recorded:
            stream = ctx.stream(tokens[:-STEPS], n_predict=STEPS, sampler=sampler)
            next(stream)
        for _ in stream:
            pass
        grows = ctx.model.table_key(len(tokens) - STEPS) != ctx.model.table_key(len(tokens))
    if grows:  # the rotary tables of earlier outputs were those of a shorter text
        return Outputs(sampler.logits[-1][None, None], {}, {})
    return Outputs(torch.stack(sampler.logits)[None], *map(_joined, recorded))


class _Forced(Sampler):
    """Keeps the logits it is given, and picks the tokens it was made with."""

    def __init__(self, tokens: list[int]) -> None:
        super().__init__()
        self.logits: list[Tensor] = []
        self._tokens = tokens

    def pick(self, logits: Tensor) -> int:
        self.logits.append(_on_host(logits))
        return self._tokens[min(len(self.logits), len(self._tokens)) - 1]


_Recorded = dict[str, list[Tensor]]


@contextmanager
def _recorded(model: PreTrainedModel) -> Iterator[tuple[_Recorded, _Recorded]]:
    """Inside, what every layer and its attention module give is kept by the layer's name."""
    layers, attention = _Recorded(), _Recorded()
    with ExitStack() as hooks:
        for name, module in _attention_in_layers(model):
            if name not in layers:
                _keep(hooks, model.get_submodule(name), layers.setdefault(name, []))
                _keep(hooks, module, attention.setdefault(name, []))
        yield layers, attention


def _keep(hooks: ExitStack, module: nn.Module, outputs: list[Tensor]) -> None:
    def keep(*call: Any) -> None:
        output = call[-1]
        hidden = output if isinstance(output, Tensor) else output[0]
        if isinstance(hidden, Tensor) and hidden.ndim == 3:
            outputs.append(_on_host(hidden))

    hooks.callback(module.register_forward_hook(keep).remove)


def _attention_in_layers(model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    """(name of the module that holds it, attention module), in order."""
    attention = {id(module) for _, module in attention_modules(model)}
    named = [
        (name.rpartition(".")[0], m) for name, m in model.named_modules() if id(m) in attention
    ]
    return [(parent, module) for parent, module in named if parent]


def _joined(recorded: _Recorded) -> dict[str, Tensor]:
    return {name: torch.cat(outputs, dim=1) for name, outputs in recorded.items() if outputs}


def _on_host(tensor: Tensor) -> Tensor:
    return tensor.detach().float().cpu().clone()
