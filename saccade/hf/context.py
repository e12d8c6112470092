"""`saccade.Context`: the runtime's Context around any model that can run."""

from __future__ import annotations

from transformers import PreTrainedModel

from saccade import runtime
from saccade.hf.check import CheckMode, verify
from saccade.hf.load import LoadedModel
from saccade.hf.model import HFModel
from saccade.runtime import ContextParams, Model


def as_model(model: Model | LoadedModel | PreTrainedModel) -> Model:
    """The runtime's view of a loaded model, a transformers model, or of a Model itself."""
    if isinstance(model, LoadedModel):
        return HFModel(model.model, model.name, model.n_ctx_train)
    if isinstance(model, PreTrainedModel):
        return HFModel(model)
    return model  # the runtime's Context checks it


class Context(runtime.Context):
    """A running model under ContextParams; see `saccade.runtime.Context` for its methods.

    Several may be open for one model, with different options, and be closed in any order.  Layers
    of known transformers classes are computed by fused kernels (`fused_layers`): on a GPU, and
    on a CPU where a few tokens are read, such as in decoding.

    Args:
        model: what `saccade.load_model` returns, a transformers model, or a `runtime.Model`.
        params: options; default ContextParams().
        reserve: tokens to allocate caches for at once, when the length is known beforehand.
        check: "auto": compare a few dozen tokens with the model's own eager attention, once for
            each model class, config and set of options (`saccade.hf.check`; about a second, then
            remembered in the user's cache folder); "always": now; "off": never.

    Raises:
        Unsupported: the check found results that differ beyond rounding.
    """

    def __init__(
        self,
        model: Model | LoadedModel | PreTrainedModel,
        params: ContextParams | None = None,
        *,
        reserve: int = 0,
        check: CheckMode = "auto",
    ) -> None:
        runnable = as_model(model)
        if isinstance(params, ContextParams | None):  # otherwise refused in the next line
            verify(runnable, params or ContextParams(), check)
        super().__init__(runnable, params, reserve=reserve)
