"""`saccade.plan`: what a model will need, from its config alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from saccade.core import BadInput
from saccade.hf.facts import facts_of
from saccade.hf.gguf import Described, describe
from saccade.hf.gguf.described import recipes_of
from saccade.hf.layers import text_config
from saccade.hf.load import LoadedModel, read_config
from saccade.hf.model import HFModel
from saccade.hf.packed_layers import weights_bytes
from saccade.hf.packed_model import storable
from saccade.runtime.located import located
from saccade.runtime.model import Model, ModelFacts
from saccade.runtime.params import ContextParams
from saccade.runtime.plan import Plan, make_plan
from saccade.runtime.plan_blueprint import Blueprint
from saccade.runtime.weights import Matrix, grouped, held_as

Source = str | Path | dict[str, Any] | PreTrainedConfig | PreTrainedModel | LoadedModel | Model


class NotWithoutMemory(BadInput):
    """A model class that can only be built with its weights in memory."""


def plan(
    model: Source,
    params: ContextParams | None = None,
    n_ctx: int | None = None,
    *,
    prompt: int | None = None,
    reserve: int = 0,
    dtype: torch.dtype | None = None,
    weights: str = "file",
) -> Plan:
    """Memory that a model needs under these options, before anything of it is loaded.

    Caches are planned to the byte: the result is what `Context.cache_bytes` will say.

    Args:
        model: a transformers folder, a GGUF file or a name ("smollm2"), of which only the config
            is read; a config or its dict (with a `model_type`); or a model that is loaded.
        params: options; default ContextParams().
        n_ctx: tokens of context; default what the params say, or the length of the training.
        prompt: how many of them are read at once, in chunks of `n_batch`; default all.
        dtype: of activations and plain weights; default what `load_model` takes on a CPU.
        weights: their form, as `load_model` takes it; nothing for a model that is loaded.

    Raises:
        BadInput: nothing that describes a model, or a length that cannot be.
        Unsupported: layers that saccade's caches do not serve.
    """
    facts, nbytes = _described(model, dtype, weights)
    return make_plan(facts, params, n_ctx, prompt=prompt, reserve=reserve, weights_bytes=nbytes)


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
    return _blueprint_of(config, name, n_ctx_train, dtype or gguf_dtype, describe(path))


def _blueprint_of(
    config: PreTrainedConfig,
    name: str,
    n_ctx_train: int | None,
    dtype: torch.dtype,
    file: Described | None = None,
) -> Blueprint:
    """The blueprint; `file` is the GGUF file that the weights are in."""
    facts = facts_of(config, name=name, n_ctx_train=n_ctx_train, dtype=dtype)
    model = _without_memory(config, dtype)
    if model is None:
        raise NotWithoutMemory(
            f"the model class of {config.model_type} cannot be built without memory, so that its "
            "size is not known before it is loaded. Plan with a model of another class."
        )
    text = text_config(config)
    experts = _first(text, "num_local_experts", "num_experts", "n_routed_experts")
    used = _first(text, "num_experts_per_tok") if experts else None
    inner = _first(text, *(["moe_intermediate_size"] if experts else []), "intermediate_size")
    kinds = _kinds(model, file)
    every = sum(each.numel() for part, each in model.named_parameters() if ".experts." in part)
    return Blueprint(
        facts=facts, weights=sum(weight.numel() for weight in model.parameters()),
        hidden=text.hidden_size, inner=(inner or 4 * text.hidden_size) * (used or 1),
        idle=every * (experts - used) // experts if experts and used else 0,
        tied=bool(getattr(text, "tie_word_embeddings", False)),
        matrices=grouped(_matrices(model, kinds)),
    )  # fmt: skip


def _kinds(model: PreTrainedModel, file: Described | None) -> dict[str, str]:
    """Weight of a layer that can be packed -> what the file has of it; "F32" in a folder."""
    names = storable(model)
    if file is None:
        return dict.fromkeys(names, "F32")
    return {
        each.parameter: each.infos[0].kind
        for each in recipes_of(model, file)
        if each.parameter in names
        and each.source.on_rows is not None
        and len(each.infos[0].shape) == 2
    }


def _matrices(model: PreTrainedModel, kinds: dict[str, str]) -> Iterator[Matrix]:
    """Linear layers and the embedding of tokens; what is tied is one matrix."""
    embedding: Any = model.get_input_embeddings()
    output: Any = model.get_output_embeddings()
    head = None if output is None else output.weight
    done: set[int] = set()
    for name, module in storable(model).items():
        weight: torch.Tensor = module.get_parameter("weight")
        if name in kinds and id(weight) not in done:
            done.add(id(weight))
            rows, width = weight.T.shape if type(module) is Conv1D else weight.shape
            is_read = module is not embedding
            yield Matrix(kinds[name], rows, width, is_head=weight is head, is_read=is_read)


def _first(config: Any, *names: str) -> int | None:
    """The first of these fields that is a positive number."""
    found = (getattr(config, name, None) for name in names)
    return next((value for value in found if isinstance(value, int) and value > 0), None)


def _described(
    model: Source, dtype: torch.dtype | None, weights: str
) -> tuple[ModelFacts, int | None]:
    """Facts and bytes of weights."""
    if isinstance(model, LoadedModel):
        facts = HFModel(model.model, model.name, model.n_ctx_train).facts
        return facts, model.weights_bytes
    if isinstance(model, PreTrainedModel):
        return HFModel(model).facts, weights_bytes(model)
    if isinstance(model, dict):
        model = _config_from(model)
    if isinstance(model, PreTrainedConfig):
        config, name, n_ctx_train = model, model.model_type, None
    elif isinstance(model, str | Path):
        is_folder = located(model).is_dir()
        held, dtype = held_as(weights, dtype, "cpu", is_folder=is_folder)
        config, name, n_ctx_train = read_config(model)
        with suppress(NotWithoutMemory):
            found = blueprint(model, dtype).holding(held)
            return found.facts, found.weights_bytes
    else:
        return model.facts, None
    dtype = dtype or _dtype_of(config)
    facts = facts_of(config, name=name, n_ctx_train=n_ctx_train, dtype=dtype)
    built = _without_memory(config, dtype)
    # Without memory no two parameters have addresses that tell them apart.
    return facts, None if built is None else sum(each.nbytes for each in built.parameters())


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
