"""A loaded model with another number of KV heads: more are exact copies, fewer are merged.

MHA, GQA and MQA differ in how many query heads read one KV head (GQA, arXiv 2305.13245).  With more
KV heads, each is a copy of its own one: the output is the same, and the cache is as large as that
of a model that never shared heads.  With fewer, groups of KV heads become one head each:

mean      their mean, as in section 2.1 of that paper, without its further training
aligned   heads are turned into a common basis before they are merged; see `hf.convert_aligned`
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, Literal, get_args

from torch import Tensor, nn
from transformers import PreTrainedModel

from saccade.core import Unsupported
from saccade.hf.convert_aligned import merge
from saccade.hf.convert_calibrate import moments_of, rows_of
from saccade.hf.convert_freedom import freedoms
from saccade.hf.convert_shapes import Changes, head_changes
from saccade.hf.heads import FUSED, Heads, Swap, check_projections, layers_of, read_heads
from saccade.hf.layers import attention_modules, text_config

Method = Literal["mean", "aligned"]
METHODS: Final = get_args(Method)
KEYS: Final = ("k_proj", "v_proj", FUSED)
"""Layers whose size depends on the number of KV heads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """What was done to a model.

    Attributes:
        before, after: KV heads of a layer.
        notes: what could not be done as asked, a sentence each.
        swaps: what was replaced in each attention layer.
    """

    before: int
    after: int
    method: Method
    notes: list[str] = field(default_factory=list)
    swaps: list[Swap] = field(default_factory=list)


@contextmanager
def converted_heads(
    model: PreTrainedModel,
    num_kv_heads: int,
    *,
    method: Method = "mean",
    calibration: Tensor | None = None,
) -> Iterator[Conversion]:
    """The model with `num_kv_heads` KV heads in every layer; restored on exit.

    Args:
        num_kv_heads: a divisor of the query heads, and a divisor or a multiple of the KV heads that
            the model has.
        method: how KV heads are merged; nothing is lost, whatever the method, where there are more.
        calibration: token ids `[n]` or `[rows, n]` of ordinary text, which "aligned" needs.

    Raises:
        Unsupported: a model whose heads cannot be changed.
        ValueError: another method or number of heads, or no calibration for "aligned".
        TypeError: a number of heads that is no whole number.
    """
    done = check_conversion(model, num_kv_heads, method)
    if method == "aligned" and done.after < done.before and calibration is None:
        raise ValueError(
            'method="aligned" needs calibration=, the token ids of a few thousand tokens of '
            'ordinary text, got None. Give them, or use method="mean".'
        )
    changes = head_changes(model, num_kv_heads)
    layers = _new_layers(model, done, calibration)
    _check_shapes(model, changes, layers)
    done.swaps.extend(swaps_of(model, changes, layers))
    modules = dict(model.named_modules())
    with ExitStack() as undo:
        for name, attributes in changes.attributes.items():
            for attribute, value in attributes.items():
                replace(undo, modules[name], attribute, value)
        replace(undo, text_config(model), "num_key_value_heads", done.after)
        for swap in done.swaps:
            undo.callback(swap.put, swap.before)
            swap.put(swap.after)
        yield done


def check_conversion(model: PreTrainedModel, num_kv_heads: int, method: str) -> Conversion:
    """What a conversion would do.

    Raises:
        As `converted_heads`.
    """
    heads, own = head_counts(model)
    if method not in METHODS:
        raise ValueError(f"method is one of {', '.join(METHODS)}, got {method!r}.")
    if type(num_kv_heads) is not int:
        raise TypeError(
            f"num_kv_heads is a whole number, got {type(num_kv_heads).__name__} {num_kv_heads!r}."
        )
    possible = [k for k in range(1, heads + 1) if heads % k == 0 and (own % k == 0 or k % own == 0)]
    if num_kv_heads not in possible:
        raise ValueError(
            f"a model with {heads} query heads and {own} KV heads can have "
            f"{', '.join(map(str, possible))} KV heads, got {num_kv_heads}. Choose one of these."
        )
    for _, module in attention_modules(model):
        check_projections(module)
    return Conversion(before=own, after=num_kv_heads, method=method)  # type: ignore[arg-type]


def head_counts(model: PreTrainedModel) -> tuple[int, int]:
    """Query heads and KV heads of every layer.

    Raises:
        Unsupported: a config that cannot say one number of KV heads for all layers.
    """
    config = text_config(model)
    counts = [getattr(config, f"num_{kind}_heads", None) for kind in ("attention", "key_value")]
    if not all(type(count) is int and count > 0 for count in counts) or not attention_modules(
        model
    ):
        raise Unsupported(
            f"the config of a {config.model_type} has no field num_key_value_heads with one number "
            "for all layers, so no model of this class can share KV heads. It works for Llama, "
            "Mistral, Qwen, Gemma and Phi-3."
        )
    return config.num_attention_heads, config.num_key_value_heads


def _new_layers(
    model: PreTrainedModel, done: Conversion, calibration: Tensor | None
) -> list[Mapping[str, nn.Linear]]:
    """The projections of every layer with their new heads."""
    heads, own = head_counts(model)
    modules = [module for _, module in attention_modules(model)]
    parts = [read_heads(module, heads, own) for module in modules]
    if done.after >= own or calibration is None or done.method == "mean":
        made = [averaged(part, done.after) for part in parts]
    else:
        embeddings: Any = model.get_input_embeddings()
        rows = rows_of(calibration, len(embeddings.weight))
        freedom, notes = freedoms(model, heads, own)
        done.notes.extend(notes)
        moments = moments_of(model, rows, heads, own)
        made = [
            merge(part, seen, done.after, allowed)
            for part, seen, allowed in zip(parts, moments, freedom, strict=True)
        ]
    return [
        layers_of(module, each, part)
        for module, part, each in zip(modules, parts, made, strict=True)
    ]


def swaps_of(
    model: PreTrainedModel, changes: Changes, layers: Sequence[Mapping[str, nn.Linear]]
) -> list[Swap]:
    """What is replaced in each attention layer, in order."""
    names = {module: name for name, module in model.named_modules()}
    found: list[Swap] = []
    for (_, module), new in zip(attention_modules(model), layers, strict=True):
        after = {**changes.attributes.get(names[module], {}), **new}
        found.append(Swap(module, {name: getattr(module, name) for name in after}, after))
    return found


def _check_shapes(
    model: PreTrainedModel, changes: Changes, made: Sequence[Mapping[str, nn.Linear]]
) -> None:
    """Raise Unsupported unless new layers have the shapes that the class expects of them."""
    new = [part.shape for layers in made for name in KEYS if name in layers
           for part in layers[name].parameters()]  # fmt: skip
    if changes.shapes and sorted(new) != sorted(changes.shapes.values()):
        raise Unsupported(
            f"{type(model).__name__} keeps keys or values in another form than num_key_value_heads "
            "heads of one size in every layer, so its heads cannot be converted. Use a model whose "
            "layers all have the same KV heads."
        )


def averaged(heads: Heads, num_kv_heads: int) -> Heads:
    """Copies of KV heads, or the means of neighbouring ones."""
    own = len(heads.k)
    if num_kv_heads == own:
        return heads
    if num_kv_heads > own:
        copies = num_kv_heads // own
        k, v = (part.repeat_interleave(copies, dim=0) for part in (heads.k, heads.v))
    else:
        k, v = (part.unflatten(0, (num_kv_heads, -1)).mean(1) for part in (heads.k, heads.v))
    return Heads(heads.q, k, v, heads.o)


def replace(undo: ExitStack, owner: Any, name: str, value: Any) -> None:
    """Set an attribute, and note that the old value (the same object) has to come back."""
    undo.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)
