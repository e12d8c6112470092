"""The self-check: a model gives through saccade what its own eager attention gives.

A few dozen fixed tokens go through the model in one forward pass without a cache, and through a
`Context` in chunks and single steps.  The first comparison is with the model's own eager attention.
Options that change the result on purpose (a window, scaled positions) are compared with the same
options in one forward pass of the backend "reference", which the first comparison has covered.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any, Final, Literal, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from saccade.core import BadInput, Unsupported
from saccade.hf import changes, check_store
from saccade.hf.attach import attach
from saccade.hf.layers import attention_modules, text_config
from saccade.hf.model import HFModel
from saccade.hf.runs import Undo, run_in_force
from saccade.hf.settings import ATTRIBUTE
from saccade.runtime import Context, ContextParams, Model, Sampler
from saccade.runtime.params import QUANTIZED
from saccade.sparse import Pattern

CheckMode = Literal["auto", "always", "off"]
AS_IT_IS: Final = "as it is"
MODES: Final = ("auto", "always", "off")
PROMPT, STEPS, CHUNK, WINDOW, SINKS = 32, 4, 12, 12, 4
QUANTIZED_PROMPT, QUANTIZED_CHUNK = 136, 48
"""Enough tokens for a full group to be quantized behind those kept in full precision."""

_BOUNDS: Final = {torch.float32: 1e-4, torch.float64: 1e-4, torch.float16: 1e-2}
_STORED_BOUNDS: Final = {"f16": 1e-2, "bf16": 5e-2, "int8": 0.1, "fp8": 0.25, "int4": 0.6}
"""Largest difference relative to the reference (both as vectors): rounding alone stays below."""

_MEANT: Final = (
    ("n_swa", "n_sinks"),
    ("rope_scaling_type", "rope_freq_base", "rope_freq_scale"),
    ("yarn_ext_factor", "yarn_attn_factor", "yarn_beta_fast", "yarn_beta_slow", "yarn_orig_ctx"),
)
"""Options that change the result on purpose, which the reference therefore has too."""
_TOGETHER: Final = (
    *_MEANT,
    ("type_k", "type_v"),
    ("kv_policy", "kv_budget"),
    ("sparse",),
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


@dataclass(slots=True)
class Outputs:
    """Logits `[n, vocab]` of the last positions, and the output `[t, hidden]` of each layer."""

    logits: Tensor
    layers: dict[str, Tensor]


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
    if mode == "off" or not isinstance(model, HFModel) or model.model.training:
        return
    if run_in_force(model.model) is not None:
        return
    for label in dict.fromkeys((AS_IT_IS, described(params))):
        eager = label == AS_IT_IS
        if eager and ATTRIBUTE in vars(model.model):
            continue
        if mode == "auto" and check_store.has_passed(model.model, label):
            continue
        found = check_eager(model) if eager else check_options(model, params)
        if found.refusal is None and not found.ok:
            raise Unsupported(found.sentence(model.facts.name))
        if found.ok:
            check_store.remember(model.model, label)


def check_eager(model: HFModel) -> Checked:
    """The model without options, against its own eager attention."""
    tokens = _tokens(model.model, PROMPT)
    params = ContextParams(n_batch=CHUNK)
    try:
        expected = _eager(model.model, tokens)
    except Exception as error:  # whatever a model that cannot run by itself raises
        return Checked(options=AS_IT_IS, refusal=f"{type(error).__name__}: {error}")
    try:
        got = _in_context(model, params, tokens)
    except (Unsupported, BadInput, ValueError) as error:
        return Checked(options=AS_IT_IS, refusal=str(error))
    return _compared(model, AS_IT_IS, tokens, got, expected, _bound(model.model, params))


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
    tokens = _tokens(model.model, QUANTIZED_PROMPT if quantized else PROMPT)
    expected = _reference(model.model, params, tokens)
    got = _in_context(model, params, tokens)
    return _compared(model, label, tokens, got, expected, _bound(model.model, params))


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
    return replace(params, **sizes)


def _one_block(pattern: Pattern) -> Pattern | None:
    """The pattern in blocks that hold all tokens; None for patterns without a block size."""
    if not hasattr(pattern, "block"):
        return None
    wide: Any = replace(cast(Any, pattern), block=64)
    return wide


def _bound(model: PreTrainedModel, params: ContextParams) -> float:
    stored = [_STORED_BOUNDS.get(kind or "", 0.0) for kind in (params.type_k, params.type_v)]
    return max(_BOUNDS.get(model.dtype, _STORED_BOUNDS["bf16"]), *stored)


def _tokens(model: PreTrainedModel, prompt: int) -> Tensor:
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


def _eager(model: PreTrainedModel, tokens: Tensor) -> Outputs:
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


def _reference(model: PreTrainedModel, params: ContextParams, tokens: Tensor) -> Outputs:
    """One forward pass without a cache, with the options that change the result on purpose."""
    meant = {name: getattr(params, name) for name in ("n_ctx", *sum(_MEANT, ()))}
    with attach(model, ContextParams(**meant, backend="reference", fused_layers=False)):
        return _forward(model, tokens)


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
    """One forward pass without a cache; of several equal rows the first one's outputs."""
    batch = tokens.expand(rows, -1).to(model.device)
    with _recorded(model) as layers:
        output = model(input_ids=batch, use_cache=False)
    if getattr(output, "logits", None) is None:
        raise Unsupported(f"{type(model).__name__} gives no logits that could be compared.")
    return Outputs(_on_host(output.logits[0, -STEPS - 1 :]), _joined(layers))


def _in_context(model: HFModel, params: ContextParams, tokens: Tensor) -> Outputs:
    """The same tokens through a Context: a prompt in chunks, then single steps.

    All logits from the end of the prompt on, or those after the last step alone.
    """
    sampler = _Forced(tokens[-STEPS:].tolist())
    with Context(model, params) as ctx:
        with _recorded(model.model) as layers:
            stream = ctx.stream(tokens[:-STEPS], n_predict=STEPS, sampler=sampler)
            next(stream)
        for _ in stream:
            pass
        grows = ctx.model.table_key(len(tokens) - STEPS) != ctx.model.table_key(len(tokens))
    if grows:  # the rotary tables of earlier outputs were those of a shorter text
        return Outputs(sampler.logits[-1][None], {})
    return Outputs(torch.stack(sampler.logits), _joined(layers))


class _Forced(Sampler):
    """Keeps the logits it is given, and picks the tokens it was made with."""

    def __init__(self, tokens: list[int]) -> None:
        super().__init__()
        self.logits: list[Tensor] = []
        self._tokens = tokens

    def pick(self, logits: Tensor) -> int:
        self.logits.append(_on_host(logits))
        return self._tokens[min(len(self.logits), len(self._tokens)) - 1]


@contextmanager
def _recorded(model: PreTrainedModel) -> Iterator[dict[str, list[Tensor]]]:
    """Inside, the outputs `[t, hidden]` of every layer are kept by the layer's name."""
    found: dict[str, list[Tensor]] = {}
    with ExitStack() as hooks:
        for name, layer in _layers(model).items():
            outputs = found.setdefault(name, [])

            def keep(*call: Any, outputs: list[Tensor] = outputs) -> None:
                output = call[-1]
                hidden = output if isinstance(output, Tensor) else output[0]
                if isinstance(hidden, Tensor) and hidden.ndim == 3:
                    outputs.append(_on_host(hidden[0]))

            hooks.callback(layer.register_forward_hook(keep).remove)
        yield found


def _layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The modules that hold an attention module each, in order."""
    attention = {id(module) for _, module in attention_modules(model)}
    names = [name for name, module in model.named_modules() if id(module) in attention]
    return {
        parent: model.get_submodule(parent)
        for parent in dict.fromkeys(name.rpartition(".")[0] for name in names)
        if parent
    }


def _joined(layers: dict[str, list[Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat(outputs) for name, outputs in layers.items() if outputs}


def _on_host(tensor: Tensor) -> Tensor:
    return tensor.detach().float().cpu().clone()


def _compared(
    model: HFModel, label: str, tokens: Tensor, got: Outputs, expected: Outputs, bound: float
) -> Checked:
    """The comparison; a difference that rounding alone makes in this model is allowed."""
    gap = _gap(got.logits, expected.logits[-len(got.logits) :])
    if not gap <= bound:
        bound = max(bound, 4 * _own_noise(model.model, tokens))
    layer = None if gap <= bound else _first_difference(got, expected, bound)
    return Checked(options=label, gap=gap, bound=bound, layer=layer)


def _own_noise(model: PreTrainedModel, tokens: Tensor) -> float:
    """What rounding costs in this model: its eager attention for one row, and for three equal rows.

    The two differ in the order of sums alone.  In a mixture of experts that is enough to choose
    another expert, and no two implementations agree more closely than this.
    """
    with _eager_attention(model):
        return _gap(_forward(model, tokens, rows=3).logits, _forward(model, tokens).logits)


def _first_difference(got: Outputs, expected: Outputs, bound: float) -> str | None:
    for name, wanted in expected.layers.items():
        ours = got.layers.get(name)
        if ours is not None:
            length = min(len(ours), len(wanted))
            if not _gap(ours[:length], wanted[:length]) <= bound:
                return name
    return None


def _gap(got: Tensor, expected: Tensor) -> float:
    """Largest distance of a row from its reference, relative to the size of the reference."""
    expected = expected.double()
    size = (expected - expected.mean(-1, keepdim=True)).norm(dim=-1)
    distance = (got.double() - expected).norm(dim=-1)
    return float((distance / size.clamp_min(1e-30)).nan_to_num(nan=torch.inf).amax())
