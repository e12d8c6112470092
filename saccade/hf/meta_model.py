"""A model without memory: which parameters a config asks for, before anything is reserved."""

from __future__ import annotations

from typing import Any, Final

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from saccade.hf.register import KEY

_OWN_ATTENTION: Final = "eager"


def without_memory(config: PreTrainedConfig) -> tuple[PreTrainedModel, list[str]]:
    """The model on the meta device, and a note where it cannot run on saccade's attention.

    Raises:
        Exception: whatever the class says about a config that it cannot use.
    """
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    exchangeable = getattr(kind, "_can_set_attn_implementation", lambda: True)()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, attn_implementation=KEY if exchangeable else _OWN_ATTENTION
        )
    if exchangeable:
        return model, []
    return model, [
        f"the class of {config.model_type} in transformers has attention of its own, so saccade's "
        "caches and kernels do not run in it; the model itself does."
    ]
