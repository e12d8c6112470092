"""`with attach(model, params):` a transformers model runs under ContextParams, then is restored."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any, Final

from transformers import PreTrainedModel

from saccade.cache import LayerCache, StagingBuffers
from saccade.core import Unsupported
from saccade.hf.cache import SaccadeCache
from saccade.hf.deferred_rope import NAME, deferring, rotary_places
from saccade.hf.fused_layers import one_row_forwards
from saccade.hf.fused_norms import plain_norms, shifted_norms
from saccade.hf.layers import attention_modules, layer_windows
from saccade.hf.register import KEY, register
from saccade.hf.rope import scaled_rope
from saccade.hf.settings import ATTRIBUTE, AttentionSettings
from saccade.runtime.layers import backend_of, layer_cache, narrowed_window
from saccade.runtime.params import ContextParams

_ORIGINAL: Final = "saccade_original"


class Attached:
    """A model inside `with attach(...)`.

    Attributes:
        model: the transformers model.
        params: the options in force.
    """

    def __init__(self, model: PreTrainedModel, params: ContextParams) -> None:
        self.model, self.params = model, params

    def new_cache(self, *, reserve: int = 0) -> SaccadeCache:
        """Empty caches for the params, to be passed as `past_key_values`.

        Args:
            reserve: tokens to allocate for at once, when the final length is known.

        Raises:
            Unsupported: a model with layers that our caches do not serve.
        """
        return new_cache(self.model, self.params, reserve=reserve)


def new_cache(model: PreTrainedModel, params: ContextParams, *, reserve: int = 0) -> SaccadeCache:
    """Empty caches for a model under params; see `Attached.new_cache`."""

    staging = None if params.offload_kqv else StagingBuffers()

    def make(layer: int, own: int | None) -> LayerCache:
        return layer_cache(own, params, staging=staging, reserve=reserve)

    return SaccadeCache(model.config, make)


@contextmanager
def attach(model: PreTrainedModel, params: ContextParams | None = None) -> Iterator[Attached]:
    """Run a transformers model on saccade's attention under these params.

    Everything is put back on exit, also after an exception: attention implementation, rotary
    modules (the same objects), attributes.  Attached models can be attached again inside.
    `generate()` works inside; it brings saccade's caches by itself where the params need them.

    Args:
        model: a transformers model whose attention goes through the attention interface.
        params: options; default ContextParams(), which changes only who computes attention.

    Raises:
        Unsupported: options that this model cannot run with.
    """
    params = params or ContextParams()
    register()
    settings = _settings(model, params)
    with ExitStack() as undo:
        undo.enter_context(scaled_rope(model, params))
        _switch_attention(undo, model)
        modules = attention_modules(model)
        for index, module in modules:
            _set(undo, module, ATTRIBUTE, settings(index))
        for code, usual in rotary_places([module for _, module in modules]):
            _set(undo, code, NAME, deferring(usual))
        if model.device.type == "cuda":
            norms = list(plain_norms(model))
            rows = one_row_forwards(model, [module for module, _ in norms])
            for module, forward in [*norms, *shifted_norms(model), *rows]:
                _set(undo, module, "forward", forward)
        attached = Attached(model, params)
        _set(undo, model, "generate", _generate_with_cache(attached))
        yield attached


def _settings(model: PreTrainedModel, params: ContextParams) -> Callable[[int], AttentionSettings]:
    """Settings of a layer by its index."""
    narrows = params.n_swa is not None or params.sparse is not None
    windows = layer_windows(model.config) if narrows else ()
    backend = backend_of(params)

    def of_layer(index: int) -> AttentionSettings:
        own = windows[index] if windows else None
        window, sinks = narrowed_window(own, params)
        return AttentionSettings(
            backend=backend,
            window=window,
            sinks=sinks,
            sparse=params.sparse if own is None else None,  # a window is sparse already
            needs_own_cache=_needs_own_cache(params),
        )

    return of_layer


def _needs_own_cache(params: ContextParams) -> bool:
    options = (params.type_k, params.page_size, params.kv_policy)
    return any(option is not None for option in options) or not params.offload_kqv


def _switch_attention(undo: ExitStack, model: PreTrainedModel) -> None:
    """`set_attn_implementation`, with every config it touches put back as it was."""
    configs = {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}
    for config in configs.values():
        for nested in _with_sub_configs(config):
            name = "_attn_implementation_internal"
            undo.callback(setattr, nested, name, getattr(nested, name))
    model.set_attn_implementation(KEY)
    if model.config._attn_implementation != KEY:
        raise Unsupported(
            f"{type(model).__name__} does not call transformers' attention interface, so its "
            "attention cannot be replaced. Use a model class that supports attn_implementation."
        )


def _with_sub_configs(config: Any) -> list[Any]:
    found = [config]
    for name in getattr(config, "sub_configs", {}):
        nested = getattr(config, name, None)
        if nested is not None:
            found += _with_sub_configs(nested)
    return found


def _set(undo: ExitStack, owner: Any, name: str, value: Any) -> None:
    """Set an instance attribute; on exit the old one comes back, or none where none was."""
    had = name in vars(owner)
    if had:
        undo.callback(setattr, owner, name, vars(owner)[name])
    else:
        undo.callback(delattr, owner, name)
    setattr(owner, name, value)


def _generate_with_cache(attached: Attached) -> Callable[..., Any]:
    """`generate` that brings the cache the params ask for, unless the caller brings one."""
    params = attached.params
    current: Any = attached.model.generate
    # Attached inside an attached model: what counts are the inner params alone.
    original: Callable[..., Any] = getattr(current, _ORIGINAL, current)

    @wraps(original)
    def generate(*args: Any, **kwargs: Any) -> Any:
        if params.kv_policy is not None:
            raise Unsupported(
                "generate() does not say when the prompt ends, which kv_policy needs to know. "
                "Use saccade.Context, or attach with kv_policy=None."
            )
        if params.n_swa is None and not _needs_own_cache(params):
            return original(*args, **kwargs)
        if kwargs.get("past_key_values") is None:
            _check_no_conflict(kwargs)
            kwargs["past_key_values"] = attached.new_cache()
        return original(*args, **kwargs)

    setattr(generate, _ORIGINAL, original)
    return generate


def _check_no_conflict(kwargs: dict[str, Any]) -> None:
    config = kwargs.get("generation_config")
    for name in ("use_cache", "cache_implementation"):
        value = kwargs.get(name, getattr(config, name, None))
        if value is False or isinstance(value, str):
            raise Unsupported(
                f"{name}={value!r} conflicts with the cache that the params ask for. "
                f"Leave {name} out."
            )
