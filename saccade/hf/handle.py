"""KVHandle: what our caches give to transformers in place of key and value tensors.

Most models pass what `Cache.update` returned to the attention function untouched.  So a cache that
stores rings, quantized keys or pages need not rebuild dense tensors: it returns a handle, which
`saccade_attention` reads.  Models that compute with cached keys themselves (latent attention, which
caches latents and expands them to heads) get tensors: any other operation on a handle rebuilds
them, where every key is there and no option has to see them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from saccade.cache import Cursor
from saccade.core import AttentionOutput, DenseKV, KVView, Unsupported
from saccade.core.kv import dense
from saccade.hf.settings import AttentionSettings
from saccade.ops import AttentionCall
from saccade.ops.kv_write.hadamard import hadamard_transform

ObserveCall = Callable[[AttentionCall, str], AttentionOutput]
"""Called with the call that ran and its lse `[B, H, Lq]` float32."""


class KVHandle:
    """Stands for the keys (or values) of one layer.

    Attributes:
        view: the keys and values, as an operator reads them.
        seen: tokens the layer has seen, the new ones included; a compressed view holds fewer.
        shape: `[B, Hkv, end, D]`, for code that reads it.
        values: whether it stands for the values.
        settings: of the run that the cache belongs to, None for a cache of no run.
        observe: runs the attention, or None.
        cursor: position of the queries on the device, or None; with it the view is all storage.
        window: of the cache, which drops keys outside of it; None for a cache of all keys.
        like: dtype of a tensor that is rebuilt; None: that of the storage.
        rebuilt: called when a tensor is rebuilt.
        summaries: what the cache keeps of the blocks of its keys, for a sparse pattern, or None.
    """

    __slots__ = (
        *("cursor", "like", "observe", "rebuilt", "seen", "settings"),
        *("shape", "summaries", "values", "view", "window"),
    )

    def __init__(
        self,
        view: KVView,
        *,
        seen: int,
        width: int,
        values: bool = False,
        settings: AttentionSettings | None = None,
        observe: ObserveCall | None = None,
        cursor: Cursor | None = None,
        window: int | None = None,
        like: torch.dtype | None = None,
        rebuilt: Callable[[], None] | None = None,
        summaries: Tensor | None = None,
    ) -> None:
        self.view = view
        self.seen = seen
        self.shape = torch.Size((*view.shape[:3], width))
        self.values = values
        self.settings = settings
        self.observe = observe
        self.cursor = cursor
        self.window = window
        self.like, self.rebuilt = like, rebuilt
        self.summaries = summaries

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the keys once they are dequantized."""
        return self.view.dtype

    @property
    def device(self) -> torch.device:
        """Where the storage lies."""
        return self.view.device

    def __repr__(self) -> str:
        return f"KVHandle(shape={list(self.shape)}, view={type(self.view).__name__})"

    def tensor(self) -> Tensor:
        """The keys (or values) `[B, Hkv, seen, D]` of all tokens, as they were given to the cache.

        Raises:
            Unsupported: keys that are not all there, or options that only our attention knows.
        """
        _check_complete(self)
        tile = dense(self.view)
        found = tile.v if self.values else tile.k
        if self.view.hadamard:
            found = hadamard_transform(found)
        if self.rebuilt is not None:
            self.rebuilt()
        return found if self.like is None else found.to(self.like)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {name: _rebuilt(arg) for name, arg in (kwargs or {}).items()}
        return func(*(_rebuilt(arg) for arg in args), **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copy, numpy and others look for optional methods
            raise AttributeError(name)
        return getattr(self.tensor(), name)

    def __getitem__(self, index: Any) -> Any:
        return self.tensor()[index]


def paired(key: Any, value: Any) -> tuple[Any, Any]:
    """Both as handles of one layer, or both as tensors: a model may have changed one of them."""
    handles = isinstance(key, KVHandle) and isinstance(value, KVHandle)
    if handles and key.view is value.view and not key.values and value.values:
        return key, value
    return _rebuilt(key), _rebuilt(value)


def check_window(handle: KVHandle, window: int | None) -> None:
    """Raise Unsupported where the model's mask shows keys that its cache has dropped.

    Args:
        window: of the mask, None for none.
    """
    settings = handle.settings
    if handle.window is None or window is not None or (settings and settings.window):
        return
    raise Unsupported(
        f"the config of this model says sliding_window={handle.window}, but the model masks "
        "nothing outside of it, so it would attend to keys that its caches drop. Set "
        "config.sliding_window to None, or use the model as transformers runs it."
    )


def _rebuilt(arg: Any) -> Any:
    if isinstance(arg, KVHandle):
        return arg.tensor()
    return type(arg)(map(_rebuilt, arg)) if type(arg) in (list, tuple) else arg


def _check_complete(handle: KVHandle) -> None:
    """Raise Unsupported where the model's own attention would differ from ours."""
    settings = handle.settings
    if settings is not None and (settings.window is not None or settings.sparse is not None):
        reason = "n_swa and sparse patterns have"
    elif handle.observe is not None:
        reason = "a kv_policy has"
    elif handle.cursor is not None:
        reason = "a captured step has"
    elif handle.shape[2] != handle.seen or (isinstance(handle.view, DenseKV) and _has_gaps(handle)):
        reason = "a cache that drops tokens (compressed, or a sliding window's) has"
    else:
        return
    raise Unsupported(
        f"the model computes with cached keys itself before it attends to them, so {reason} no "
        "effect here: expected a cache that keeps all tokens. Leave the option out for this model."
    )


def _has_gaps(handle: KVHandle) -> bool:
    """Whether a view of dense storage lacks positions, as that of a ring does."""
    return len(dense(handle.view).positions.flatten()) != handle.seen
