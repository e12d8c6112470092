"""`saccade.plan`: what a model will need, from its config alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from saccade.core import BadInput
from saccade.hf.facts import facts_of
from saccade.hf.gguf import describe
from saccade.hf.gguf.tensors import source_of
from saccade.hf.layers import text_config
from saccade.hf.load import LoadedModel, read_config
from saccade.hf.model import HFModel
from saccade.runtime.located import located
from saccade.runtime.model import Model, ModelFacts
from saccade.runtime.params import ContextParams
from saccade.runtime.plan import Plan, make_plan
from saccade.runtime.plan_blueprint import Blueprint
from saccade.runtime.weights import Matrix, grouped

_KINDS: Final = {torch.bfloat16: "BF16", torch.float16: "F16"}
Source = str | Path | dict[str, Any] | PreTrainedConfig | PreTrainedModel | LoadedModel | Model


def plan(
    model: Source,
    params: ContextParams | None = None,
    n_ctx: int | None = None,
    *,
    prompt: int | None = None,
    reserve: int = 0,
    dtype: torch.dtype | None = None,
) -> Plan:
    """Memory that a model needs under these options, before anything of it is loaded.

    Caches are planned to the byte: the result is what `Context.cache_bytes` will say.

    Args:
        model: a transformers folder, a GGUF file or a name ("smollm2"), of which only the config
            is read; a config or its dict (with a `model_type`); or a model that is loaded.
        params: options; default ContextParams().
        n_ctx: tokens of context; default what the params say, or the length of the training.
        prompt: how many of them are read at once, in chunks of `n_batch`; default all.
        dtype: of weights and queries; default what `load_model` takes.

    Raises:
        BadInput: nothing that describes a model, or a length that cannot be.
        Unsupported: layers that saccade's caches do not serve.
    """
    facts, weights = _described(model, dtype)
    return make_plan(facts, params, n_ctx, prompt=prompt, reserve=reserve, weights_bytes=weights)


def blueprint(
    source: str | Path, dtype: torch.dtype | None = None, gguf_dtype: torch.dtype = torch.float32
) -> Blueprint:
    """Sizes of any model that transformers knows, from its config; slower than `plan_files`.

    Args:
        dtype: of the weights; None: what a config says, `gguf_dtype` for GGUF.

    Raises:
        BadInput: nothing that describes a model, or one that cannot be built.
        Unsupported: layers that saccade's caches do not serve.
    """
    config, name, n_ctx_train = read_config(source)
    path = located(source)
    if path.is_dir():
        return _blueprint_of(config, name, n_ctx_train, dtype or _dtype_of(config))
    return _blueprint_of(config, name, n_ctx_train, dtype or gguf_dtype, _kinds_in(path))


def _kinds_in(path: Path) -> Callable[[str], str]:
    """Parameter -> the kind of its tensor in a GGUF file; "F32" for one made of several."""
    described = describe(path)
    tensors = described.facts.file.tensors

    def kind_of(parameter: str) -> str:
        found = source_of(parameter, described.row.sources, described.config)
        names = [one for name in (found[0] if found else ()) for one in name.split("|")]
        kinds = [tensors[name].kind for name in names if name in tensors]
        return kinds[0] if len(kinds) == 1 else "F32"

    return kind_of


def _blueprint_of(
    config: PreTrainedConfig,
    name: str,
    n_ctx_train: int | None,
    dtype: torch.dtype,
    kinds: Callable[[str], str] | None = None,
) -> Blueprint:
    """The blueprint; `kinds` says what the file has of a parameter."""
    facts = facts_of(config, name=name, n_ctx_train=n_ctx_train, dtype=dtype)
    model = _without_memory(config, dtype)
    if model is None:
        raise BadInput(
            f"the model class of {config.model_type} cannot be built without memory, so that its "
            "size is not known before it is loaded. Plan with a model of another class."
        )
    text = text_config(config)
    experts = _first(text, "num_local_experts", "num_experts", "n_routed_experts")
    used = _first(text, "num_experts_per_tok") if experts else None
    inner = _first(text, *(["moe_intermediate_size"] if experts else []), "intermediate_size")
    own = _KINDS.get(_dtype_of(config), "F32")
    kinds = kinds or (lambda _: own)
    every = sum(each.numel() for part, each in model.named_parameters() if ".experts." in part)
    return Blueprint(
        facts=facts, weights=sum(weight.numel() for weight in model.parameters()),
        hidden=text.hidden_size, inner=(inner or 4 * text.hidden_size) * (used or 1),
        idle=every * (experts - used) // experts if experts and used else 0,
        tied=bool(getattr(text, "tie_word_embeddings", False)),
        matrices=grouped(_matrices(model, kinds)),
    )  # fmt: skip


def _matrices(model: PreTrainedModel, kinds: Callable[[str], str]) -> Iterator[Matrix]:
    """Linear layers and the embedding of tokens; what is tied is one matrix."""
    embedding: Any = model.get_input_embeddings()
    output: Any = model.get_output_embeddings()
    tied = output is not None and output.weight is embedding.weight
    for name, module in model.named_modules():
        looked_up = module is embedding
        if (tied and module is output) or not (looked_up or type(module) in (nn.Linear, Conv1D)):
            continue
        weight: torch.Tensor = module.get_parameter("weight")
        rows, width = weight.T.shape if type(module) is Conv1D else weight.shape
        is_head = module is output or (looked_up and tied)
        kind = kinds(f"{name}.weight")
        yield Matrix(kind, rows, width, is_head=is_head, is_read=not looked_up)


def _first(config: Any, *names: str) -> int | None:
    """The first of these fields that is a positive number."""
    found = (getattr(config, name, None) for name in names)
    return next((value for value in found if isinstance(value, int) and value > 0), None)


def _described(model: Source, dtype: torch.dtype | None) -> tuple[ModelFacts, int | None]:
    """Facts and bytes of weights."""
    if isinstance(model, LoadedModel):
        facts = HFModel(model.model, model.name, model.n_ctx_train).facts
        return facts, _bytes_of(model.model)
    if isinstance(model, PreTrainedModel):
        return HFModel(model).facts, _bytes_of(model)
    if isinstance(model, dict):
        model = _config_from(model)
    if isinstance(model, PreTrainedConfig):
        config, name, n_ctx_train = model, model.model_type, None
    elif isinstance(model, str | Path):
        config, name, n_ctx_train = read_config(model)
    else:
        return model.facts, None
    dtype = dtype or _dtype_of(config)
    facts = facts_of(config, name=name, n_ctx_train=n_ctx_train, dtype=dtype)
    built = _without_memory(config, dtype)
    return facts, None if built is None else _bytes_of(built)


def _config_from(values: dict[str, Any]) -> PreTrainedConfig:
    kind: Any = values.get("model_type")
    rest = {key: value for key, value in values.items() if key != "model_type"}
    try:
        return AutoConfig.for_model(kind, **rest)
    except Exception as error:  # whatever a config class does with values it does not expect
        raise BadInput(
            f"no model is described by this dict: expected what a config.json holds, with a "
            f"model_type that transformers supports, got {kind!r} and {type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}"
        ) from error


def _dtype_of(config: PreTrainedConfig) -> torch.dtype:
    """What the config says its weights are, float32 where it does not."""
    said = config.dtype or text_config(config).dtype or torch.float32
    found = said if isinstance(said, torch.dtype) else getattr(torch, str(said), None)
    if not isinstance(found, torch.dtype):
        raise BadInput(f"the config says dtype={said!r}, expected a dtype of torch. Correct it.")
    return found


def _without_memory(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel | None:
    """The model on the meta device, None where it cannot be built there."""
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=dtype)
    except Exception:  # whatever a model class does that has no meaning without memory
        return None


def _bytes_of(model: PreTrainedModel) -> int:
    return sum(weight.nbytes for weight in model.parameters())
