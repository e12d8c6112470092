"""The self-check: a model gives through saccade what its own eager attention gives.

A few dozen fixed tokens go through the model in one forward pass without a cache, and through a
`Context` in chunks and single steps.  The first comparison is with the model's own eager attention.
Options that change the result on purpose (a window, scaled positions) are compared with the same
options in one forward pass of the backend "reference", which the first comparison has covered.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, Final, Literal, cast

import torch
from torch import Tensor

from saccade.core import BadInput, Unsupported
from saccade.hf import check_store
from saccade.hf.check_passes import (
    MEANT,
    Outputs,
    eager,
    in_context,
    is_half,
    reference,
    rounded_otherwise,
    rounds_products,
    sample_tokens,
)
from saccade.hf.model import HFModel
from saccade.hf.runs import run_in_force
from saccade.hf.settings import ATTRIBUTE
from saccade.runtime import ContextParams, Model
from saccade.runtime.params import QUANTIZED
from saccade.sparse import Pattern

CheckMode = Literal["auto", "always", "off"]
AS_IT_IS: Final = "as it is"
MODES: Final = ("auto", "always", "off")
PROMPT, CHUNK, WINDOW, SINKS = 32, 12, 12, 4
QUANTIZED_PROMPT, QUANTIZED_CHUNK = 136, 48
"""Enough tokens for a full group to be quantized behind those kept in full precision."""

_BOUNDS: Final = {
    torch.float32: 1e-4, torch.float64: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1.6e-2
}  # fmt: skip
"""Difference relative to the reference (both as vectors) that is rounding in every model."""
_NOISE: Final = 3.0
"""How much more than rounding costs eager attention in the worst of some trials."""
_STORED_BOUNDS: Final = {"f16": 1e-2, "bf16": 5e-2, "int8": 0.1, "fp8": 0.25, "int4": 0.6}
"""What a cache of another type may cost on top."""

_TOGETHER: Final = (
    *MEANT,
    ("type_k", "type_v"),
    ("kv_policy", "kv_budget"),
    ("n_draft",),
    ("sparse", "n_draft"),
    ("page_size",),
    ("offload_kqv",),
    ("fused_layers",),
    ("backend", "flash_attn"),
    ("ctx_checkpoints",),
)
"""Options that are left out together when the check looks for the one that is at fault."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """What one comparison found.

    Attributes:
        options: the options that were not at their defaults, "as it is" for none.
        gap: largest relative difference of the logits.
        bound: what rounding may cost.
        layer: the first layer whose output differs by more, by its name in the model.
        leave_out: the options without which the results agree, where that was found.
        refusal: why the options cannot run with this model; nothing was compared then.
    """

    options: str
    gap: float = 0.0
    bound: float = 0.0
    layer: str | None = None
    leave_out: str | None = None
    refusal: str | None = None

    @property
    def ok(self) -> bool:
        """Whether both gave the same to rounding."""
        return self.refusal is None and self.gap <= self.bound

    def sentence(self, name: str) -> str:
        """What a caller is told about results that differ."""
        where = "in the logits alone" if self.layer is None else f"first in {self.layer}"
        advice = f"Leave out {self.leave_out}." if self.leave_out else (
            "Run this model with an attention implementation of transformers."
        )  # fmt: skip
        return (
            f"{name} does not give the same through saccade ({self.options}): the self-check found "
            f"a relative difference of {self.gap:.2g}, where rounding explains {self.bound:.2g}, "
            f"{where}. {advice}"
        )


def verify(model: Model, params: ContextParams, mode: CheckMode = "auto") -> None:
    """Refuse a model or options whose results differ beyond rounding.

    Options that cannot run at all are refused where they are used, with an error that says more.
    Nothing is compared in training mode or inside `attach`; eager attention is not switched on
    while other contexts of the model are open.

    Raises:
        ValueError: an unknown mode.
        Unsupported: results differ; the message names the layer and the option to leave out.
    """
    if mode not in MODES:
        raise ValueError(f"check must be one of {', '.join(MODES)}, got {mode!r}.")
    for label in comparisons(model, params, mode):
        assert isinstance(model, HFModel)
        found = check_eager(model) if label == AS_IT_IS else check_options(model, params)
        if found.refusal is None and not found.ok:
            raise Unsupported(found.sentence(model.facts.name))
        if found.ok:
            check_store.remember(model.model, label)


def comparisons(model: Model, params: ContextParams, mode: CheckMode = "auto") -> list[str]:
    """What `verify` would compare now: AS_IT_IS and the options, without what has passed."""
    if mode == "off" or not isinstance(model, HFModel) or model.model.training:
        return []
    if run_in_force(model.model) is not None:
        return []
    labels = list(dict.fromkeys((AS_IT_IS, described(params))))
    if ATTRIBUTE in vars(model.model):  # other contexts are open
        labels.remove(AS_IT_IS)
    if mode == "always":
        return labels
    return [label for label in labels if not check_store.has_passed(model.model, label)]


def check_eager(model: HFModel) -> Checked:
    """The model without options, against its own eager attention.

    Raises:
        Unsupported: the model's numbers are too large for its dtype, in its own attention too.
    """
    tokens = sample_tokens(model.model, PROMPT)
    params = ContextParams(n_batch=CHUNK)
    try:
        expected = eager(model.model, tokens)
    except Exception as error:  # whatever a model that cannot run by itself raises
        return Checked(options=AS_IT_IS, refusal=f"{type(error).__name__}: {error}")
    try:
        got = in_context(model, params, tokens)
    except (Unsupported, BadInput, ValueError) as error:
        return Checked(options=AS_IT_IS, refusal=str(error))
    if not expected.logits.isfinite().all():
        return _overflow(model, got)
    return _compared(model, params, tokens, got, expected)


def _overflow(model: HFModel, got: Outputs) -> Checked:
    """Nothing to compare with: refused where saccade's logits are no numbers either."""
    dtype = str(model.model.dtype).removeprefix("torch.")
    said = f"the logits of its own eager attention in {dtype} are not finite"
    if got.logits.isfinite().all():
        return Checked(options=AS_IT_IS, refusal=f"{said}, so there is nothing to compare with.")
    raise Unsupported(
        f"{model.facts.name} cannot run in {dtype}: {said}. Load it in bfloat16 or float32."
    )


def check_options(model: HFModel, params: ContextParams) -> Checked:
    """The model under params, against one forward pass of the backend "reference".

    Sizes are made small enough to matter for so few tokens: a window is at most WINDOW keys.
    """
    label, small = described(params), _small(params)
    try:
        checked = _options_compared(model, label, small)
    except (Unsupported, BadInput, ValueError) as error:
        return Checked(options=label, refusal=str(error))
    if checked.ok:
        return checked
    return replace(checked, leave_out=_at_fault(model, small))


def described(params: ContextParams) -> str:
    """The options that differ from their defaults, "as it is" for none."""
    default = ContextParams()
    changed = [
        f"{part.name}={getattr(params, part.name)!r}"
        for part in fields(params)
        if part.name not in ("n_ctx", "n_batch", "n_keep")
        and getattr(params, part.name) != getattr(default, part.name)
    ]
    return ", ".join(changed) or AS_IT_IS


def _options_compared(model: HFModel, label: str, params: ContextParams) -> Checked:
    quantized = params.type_k in QUANTIZED and params.sparse is None
    tokens = sample_tokens(model.model, QUANTIZED_PROMPT if quantized else PROMPT)
    expected = reference(model.model, params, tokens)
    got = in_context(model, params, tokens)
    return replace(_compared(model, params, tokens, got, expected), options=label)


def _at_fault(model: HFModel, params: ContextParams) -> str | None:
    """The options without which the results agree; None where no single group is at fault."""
    default = ContextParams()
    for names in _TOGETHER:
        plain = {name: getattr(default, name) for name in names}
        if any(getattr(params, name) != value for name, value in plain.items()):
            try:
                fewer = replace(params, **plain)
                agrees = _options_compared(model, "", fewer).ok
            except (Unsupported, BadInput, ValueError):
                continue
            if agrees:
                return " and ".join(n for n in names if getattr(params, n) != plain[n])
    return None


def _small(params: ContextParams) -> ContextParams:
    """The same options in sizes that a few dozen tokens reach; nothing is compressed away."""
    sizes: dict[str, Any] = {"n_batch": CHUNK, "n_keep": None}
    if params.n_swa is not None:
        sizes |= {"n_swa": min(params.n_swa, WINDOW), "n_sinks": min(params.n_sinks, SINKS)}
    if params.type_k in QUANTIZED:
        sizes["n_batch"] = QUANTIZED_CHUNK
    if params.page_size is not None:
        sizes["page_size"] = min(params.page_size, CHUNK)
    if params.kv_policy is not None:
        sizes["kv_budget"] = 1.0
    if params.sparse is not None:
        sizes["sparse"] = _one_block(params.sparse)
        if sizes["sparse"] is None:
            sizes["n_draft"] = None
    return replace(params, **sizes)


def _one_block(pattern: Pattern) -> Pattern | None:
    """The pattern in blocks that hold all tokens; None for patterns without a block size."""
    block = getattr(pattern, "block", None)
    if block is None:
        return None
    wide: Any = replace(cast(Any, pattern), block=-(-64 // block) * block)
    return wide


def _compared(
    model: HFModel, params: ContextParams, tokens: Tensor, got: Outputs, expected: Outputs
) -> Checked:
    """The comparison of logits; where layers round also of what attention gives in each layer.

    Layers round in half precision, and where products with packed weights round what they are
    given.  There rounding alone moves logits as far as the error of a single layer does.  In the
    output of the first layer whose attention is wrong the two are told apart.
    """
    label, half = described(params), is_half(model.model)
    stored = max(_STORED_BOUNDS.get(kind or "", 0.0) for kind in (params.type_k, params.type_v))
    gap = _gap(got.logits, expected.logits[:, -got.logits.shape[1] :])
    bound = max(_BOUNDS.get(model.model.dtype, _BOUNDS[torch.bfloat16]), stored)
    if gap <= bound and not half:
        return Checked(options=label, gap=gap, bound=bound)
    noise = rounded_otherwise(model.model, params, tokens)
    if (half or rounds_products(model.model)) and not stored:
        for name, difference, allowed in _attention_gaps(got, expected, noise, bound):
            if not difference <= allowed:
                return Checked(options=label, gap=difference, bound=allowed, layer=name)
    bound = max(bound, stored + _NOISE * _gap(noise.logits, noise.logits[:1]))
    layer = None if gap <= bound else _first_difference(got, expected, bound)
    return Checked(options=label, gap=gap, bound=bound, layer=layer)


def _attention_gaps(
    got: Outputs, expected: Outputs, noise: Outputs, least: float
) -> Iterator[tuple[str, float, float]]:
    """(layer, difference of what its attention gives, what rounding explains), in order.

    Of the tokens' differences the median: in a mixture of experts rounding sends a few tokens to
    other experts, and a fault of attention meets most.
    """
    bound = least
    for name, wanted in expected.attention.items():
        if name in got.attention and name in noise.attention:
            rounded = noise.attention[name]
            medians = _differences(rounded, rounded[:1]).median(-1).values
            bound = max(bound, _NOISE * float(medians.amax()))
            ours = got.attention[name]
            difference = _differences(ours, wanted[:, : ours.shape[1]]).median()
            yield name, float(difference), bound


def _first_difference(got: Outputs, expected: Outputs, bound: float) -> str | None:
    for name, wanted in expected.layers.items():
        ours = got.layers.get(name)
        if ours is not None:
            length = min(ours.shape[1], wanted.shape[1])
            if not _gap(ours[:, :length], wanted[:, :length]) <= bound:
                return name
    return None


def _gap(got: Tensor, expected: Tensor) -> float:
    """Largest difference of a token."""
    return float(_differences(got, expected).amax())


def _differences(got: Tensor, expected: Tensor) -> Tensor:
    """Distance of each token from its reference `[rows, t]`, relative to the reference's size."""
    expected = expected.double()
    size = (expected - expected.mean(-1, keepdim=True)).norm(dim=-1)
    distance = (got.double() - expected).norm(dim=-1)
    return (distance / size.clamp_min(1e-30)).nan_to_num(nan=torch.inf)
