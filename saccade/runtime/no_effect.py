"""Options that change nothing for a model (a stand-in until the real one is merged)."""

from __future__ import annotations

from saccade.runtime.model import ModelFacts
from saccade.runtime.params import ContextParams


def without_effect(facts: ModelFacts, params: ContextParams) -> dict[str, str]:
    """{field that was set: one clause why it changes nothing}."""
    if params.offload_kqv is False:
        return {"offload_kqv": "keys are in host memory already"}
    return {}
