"""`with attach(model, params):` a transformers model runs under ContextParams, then is restored."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from transformers import PreTrainedModel

from saccade.cache import LayerCache, StagingBuffers
from saccade.core import Unsupported
from saccade.hf import changes
from saccade.hf.cache import SaccadeCache
from saccade.hf.captured_steps import decode_in_graphs
from saccade.hf.compressed_generate import compress_behind_prompt, is_padded
from saccade.hf.cropped_caches import check_not_cropped, guesses
from saccade.hf.fused_forward import decode_in_kernels
from saccade.hf.generate_options import option
from saccade.hf.kascade_identity import check_plan
from saccade.hf.layers import check_attention, layer_kinds
from saccade.hf.moved_sinks import move_sinks, read_prompt_in_blocks
from saccade.hf.rope import follow_length, run_rotary
from saccade.hf.rope_generate import read_chunks_of_one_text, refit_generate
from saccade.hf.runs import Change, ModelRuns, Run, Running, Undo
from saccade.hf.settings import LayerSettings, needs_own_cache
from saccade.runtime.layers import layer_cache, without_own_dtype
from saccade.runtime.params import ContextParams
from saccade.runtime.rope_options import stretches


class Attached:
    """A model inside `with attach(...)`."""

    def __init__(self, run: Run) -> None:
        self.model, self.params = run.model, run.params
        self._run = run

    def new_cache(self, *, reserve: int = 0) -> SaccadeCache:
        """Empty caches for the params, to be passed as `past_key_values`.

        Args:
            reserve: tokens to allocate for at once, when the final length is known.

        Raises:
            Unsupported: a model with layers that our caches do not serve.
        """
        return new_cache(self._run, reserve=reserve)


class Attaching(Running):
    """What `attach` returns: a `with` statement enters it."""

    def __init__(self, model: PreTrainedModel, params: ContextParams | None) -> None:
        self._model, self._params = model, params or ContextParams()

    def __enter__(self) -> Attached:
        if self.run is not None:
            raise Unsupported("this attach is entered already: call attach(model, params) again.")
        _check_carried_out(self._params)
        self.run = run = make_run(self._model, self._params, serves_every_call=True)
        try:
            super().__enter__()
            return Attached(run)
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self.run = None


def attach(model: PreTrainedModel, params: ContextParams | None = None) -> Attaching:
    """`with attach(model, params) as attached:` a transformers model runs under these params.

    With the default params this changes what computes attention.  Steps of decoding over saccade's
    own caches run through C++ layers on a CPU (`hf.fused_forward`) and as captured graphs with
    fused kernels on a GPU (`hf.captured_steps`); `generate()` brings such caches where it is given
    none.  With `fused_layers=False` they do not.  `fused_layers=True` also replaces norms, linear
    layers, MLPs and decoder layers of every call by a GPU's fused kernels, those of classes in
    `allowlist.json`.  Nothing outside the model object is changed.

    Everything is put back on exit, also after an exception.  Attached models can be attached again
    inside: the newest params alone count.  They need not be left in the reverse order.
    `generate()` works inside; it makes saccade's caches by itself where the params need them.

    The caller says how many tokens a call reads and when a text ends, so `n_batch`, `n_keep`,
    `n_draft` and an `n_ctx` without scaled positions are refused on entering; with them `n_ctx` is
    the length that positions are stretched for, and bounds nothing.  A `kv_policy` compresses where
    the prompt ends, which `generate()` says alone: other calls over caches of such a run are
    refused.

    Args:
        model: a transformers model whose attention goes through the attention interface.
        params: options; default ContextParams().

    Raises:
        TypeError: what is no transformers model, or no ContextParams.
        Unsupported: options that this model cannot run with, or that only a Context carries out.
    """
    if not isinstance(params, ContextParams | None):
        raise TypeError(
            f"expected ContextParams or None, got {type(params).__name__}. "
            "Write attach(model, saccade.ContextParams(...))."
        )
    return Attaching(checked_model(model), params)


def checked_model(model: Any) -> PreTrainedModel:
    """The transformers model itself; that in a `torch.compile`d one.

    Raises:
        TypeError: anything else, with where the model is in wrappers that are known.
    """
    model = getattr(model, "_orig_mod", model)
    if isinstance(model, PreTrainedModel):
        return model
    where = "Pass what AutoModelForCausalLM.from_pretrained returns."
    if isinstance(getattr(model, "model", None), PreTrainedModel):
        where = "Pass its .model."
    elif isinstance(getattr(model, "module", None), PreTrainedModel):
        where = "Pass its .module, which it runs."
    elif callable(getattr(model, "get_base_model", None)):
        where = "Pass its get_base_model(), whose layers hold the adapters."
    raise TypeError(f"attach takes a transformers model, got {type(model).__name__}. {where}")


def _check_carried_out(params: ContextParams) -> None:
    """Raise Unsupported for options that a Context carries out and calls of a model cannot."""
    instead = {
        "n_ctx": "generate() ends a text by max_length",
        "n_batch": "generate() reads a prompt in chunks by prefill_chunk_size",
        "n_keep": "a text that is full ends, and is never shifted",
        "n_draft": "generate() drafts by an assistant_model",
    }
    for name, said in instead.items():
        value, usual = getattr(params, name), ContextParams.__dataclass_fields__[name].default
        if value != usual and not (name == "n_ctx" and stretches(params)):
            raise Unsupported(
                f"{name}={value} has no effect under attach: {said}. Leave {name} unset, or use "
                "saccade.Context."
            )


def make_run(model: PreTrainedModel, params: ContextParams, *, serves_every_call: bool) -> Run:
    """The options of one caller for a model, and what has to change on the model for them.

    Args:
        serves_every_call: as `attach` does; a `Context` serves its own calls alone.

    Raises:
        Unsupported, ValueError: options that this model cannot run with.
    """
    if params.yarn_orig_ctx is not None and params.rope_scaling_type in (None, "none"):
        raise ValueError(
            f"yarn_orig_ctx={params.yarn_orig_ctx} changes nothing without a scaling of positions: "
            "set rope_scaling_type, or leave yarn_orig_ctx unset."
        )
    params = without_own_dtype(params, model.dtype)
    check_attention(model)
    check_plan(model, params)
    rotary = run_rotary(model, params)
    fused = params.fused_layers
    if fused is None:
        fused = not serves_every_call and model.device.type == "cuda"
    needed: dict[str, Change] = {"attention": changes.switch_attention}
    if rotary:
        needed["rotary"] = changes.dispatch_rotary
    if fused:
        needed["layers"] = changes.fuse_layers
    if serves_every_call and follow_length(rotary.values()):
        needed |= {"refit": refit_generate, "chunks": read_chunks_of_one_text}
    if serves_every_call:
        needed |= {"settings": changes.show_runs, "generate": _serve_generate}
        if model.device.type == "cuda" and params.fused_layers is not False:
            needed["steps"] = decode_in_graphs
        elif model.device.type == "cpu" and params.fused_layers is None:
            needed["steps"] = decode_in_kernels
    return Run(
        model=model,
        params=params,
        settings=LayerSettings(model.config, params),
        rotary=rotary,
        fused=fused,
        serves_every_call=serves_every_call,
        changes=needed,
    )


def running(run: Run) -> Running:
    """The model, ready for this run inside a `with`."""
    return Running(run)


def new_cache(
    run: Run, *, reserve: int = 0, n_ctx_train: int | None = None, ragged: bool = False
) -> SaccadeCache:
    """Empty caches that follow the options of a run; see `Attached.new_cache`.

    Args:
        ragged: rows and heads will keep different numbers of keys, whatever the policy.
        n_ctx_train: length that the model was trained for; default what its config says.
    """
    staging = None if run.params.offload_kqv else StagingBuffers()

    def make(layer: int, own: int | None) -> LayerCache:
        return layer_cache(own, run.params, staging=staging, reserve=reserve, ragged=ragged)

    cache = SaccadeCache(run.model.config, make, run=run)
    cache.awaits_prompt = run.serves_every_call and run.params.kv_policy is not None
    move_sinks(cache, run, n_ctx_train)
    return cache


def _serve_generate(undo: Undo, runs: ModelRuns) -> None:
    """`generate` makes the cache that the run in force needs, unless the caller brings one."""
    original: Callable[..., Any] | None = getattr(runs.model, "generate", None)
    if original is None:
        return

    @wraps(original)
    def generate(*args: Any, **kwargs: Any) -> Any:
        run = runs.in_force
        if run is not None:
            _bring_cache(run, args, kwargs)
            check_not_cropped(run.model, kwargs)
            read_prompt_in_blocks(args, kwargs)
        return original(*args, **kwargs)

    changes.override(undo, runs.model, "generate", generate)


def _bring_cache(run: Run, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    params = run.params
    needed = params.n_swa is not None or needs_own_cache(params)
    if kwargs.get("past_key_values") is None:
        if needed:
            _check_no_conflict(kwargs)
        if needed or _gains(run, kwargs):
            padded = params.kv_policy is not None and is_padded(kwargs)
            kwargs["past_key_values"] = new_cache(run, ragged=padded)
    cache = kwargs.get("past_key_values")
    if params.kv_policy is not None and isinstance(cache, SaccadeCache):
        compress_behind_prompt(cache, run, args, kwargs, new_cache)


def _gains(run: Run, kwargs: dict[str, Any]) -> bool:
    """Whether steps over our cache are faster and the caller asks for no other cache."""
    other = _conflict(run.model, kwargs) is not None or guesses(run.model, kwargs) is not None
    if "steps" not in run.changes or other:
        return False
    try:
        return all(kind.keys and not kind.states for kind in layer_kinds(run.model.config))
    except Unsupported:
        return False


def _check_no_conflict(kwargs: dict[str, Any]) -> None:
    found = _conflict(None, kwargs)
    if found is not None:
        raise Unsupported(
            f"{found} conflicts with the cache that the params require. "
            f"Leave {found.partition('=')[0]} out."
        )


def _conflict(model: PreTrainedModel | None, kwargs: dict[str, Any]) -> str | None:
    """What asks for another cache, or for none: an argument, a config, or the model's own one."""
    for name in ("use_cache", "cache_implementation"):
        value = option(kwargs, name, model)
        if value is False or isinstance(value, str):
            return f"{name}={value!r}"
    return None
