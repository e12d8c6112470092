"""KVHandle: what our caches give to transformers in place of key and value tensors.

A model's own code passes what `Cache.update` returned to the attention function untouched.  So a
cache that stores rings, quantized keys or pages need not rebuild dense tensors: it returns a
handle, which `saccade_attention` reads.  Any other operation on a handle raises Unsupported.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from saccade.cache import Cursor
from saccade.core import KVView, Unsupported
from saccade.hf.settings import AttentionSettings
from saccade.ops import AttentionCall

ObserveCall = Callable[[AttentionCall, Tensor], None]
"""Called with the call that ran and its lse `[B, H, Lq]` float32."""


class KVHandle:
    """Stands for the keys (or values) of one layer.

    Attributes:
        view: the keys and values, as an operator reads them.
        seen: tokens the layer has seen, the new ones included; a compressed view holds fewer.
        shape: `[B, Hkv, end, D]`, for code that reads it.
        settings: of the run that the cache belongs to, None for a cache of no run.
        observe: called after attention ran, or None.
        cursor: position of the queries on the device, or None; with it the view is all storage.
    """

    __slots__ = ("cursor", "observe", "seen", "settings", "shape", "view")

    def __init__(
        self,
        view: KVView,
        *,
        seen: int,
        width: int,
        settings: AttentionSettings | None = None,
        observe: ObserveCall | None = None,
        cursor: Cursor | None = None,
    ) -> None:
        self.view = view
        self.seen = seen
        self.shape = torch.Size((*view.shape[:3], width))
        self.settings = settings
        self.observe = observe
        self.cursor = cursor

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

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        _refuse(getattr(func, "__name__", str(func)))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copy, numpy and others look for optional methods
            raise AttributeError(name)
        _refuse(name)

    def __getitem__(self, index: Any) -> Any:
        _refuse("indexing")


def _refuse(operation: str) -> NoReturn:
    raise Unsupported(
        f"a saccade cache passes its keys to saccade's attention alone, but other code called "
        f"{operation} on them. Run the model inside `with attach(model, params)` or with "
        'attn_implementation="saccade"; a model whose own code reads cached keys (DeepSeek and '
        "other latent-attention families) needs a cache of transformers."
    )
