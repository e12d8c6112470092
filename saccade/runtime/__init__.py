"""Running a model: options, context, sampling, sessions, plans; see `runtime.model.Model`."""

from saccade.runtime.context import Context
from saccade.runtime.model import Model, ModelCache, ModelFacts, Observer
from saccade.runtime.params import ContextParams
from saccade.runtime.sampling import Sampler
from saccade.runtime.session import load_session, save_session
from saccade.runtime.stats import FinishReason, GeneratedToken, Stats
from saccade.runtime.step import DecodeStep

__all__ = [
    "Context",
    "ContextParams",
    "DecodeStep",
    "FinishReason",
    "GeneratedToken",
    "Model",
    "ModelCache",
    "ModelFacts",
    "Observer",
    "Sampler",
    "Stats",
    "load_session",
    "save_session",
]
