"""A model without memory: which parameters a config asks for, before anything is reserved."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from saccade.hf.register import KEY

_OWN_ATTENTION = "eager"


def without_memory(config: PreTrainedConfig) -> tuple[PreTrainedModel, list[str]]:
    """The model on the meta device, and a note where it cannot run on saccade's attention.

    Raises:
        Exception: whatever the class says about a config that it cannot use.
    """
    try:
        return _built(config, KEY), []
    except KeyError as error:  # the class looks the name up in a table of its own
        if error.args != (KEY,):
            raise
    name = config.model_type
    return _built(config, _OWN_ATTENTION), [
        f"the class of {name} in transformers has attention of its own, so saccade's caches and "
        "kernels do not run in it; the model itself does."
    ]


def _built(config: PreTrainedConfig, attention: str) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, attn_implementation=attention)
