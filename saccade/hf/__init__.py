"""Models of transformers and GGUF files.

Importing this package registers the attention implementation "saccade" with transformers:

    import saccade.hf
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="saccade")

transformers takes the name for any model.  One that does not use its attention interface (Bloom)
keeps its own attention then without a word; `attach` refuses such a model.
"""

# ruff: noqa: E402 (an old version is refused before anything is imported from it)
from saccade.core.versions import require

require("transformers")

from saccade.hf.attach import Attached, attach
from saccade.hf.cache import SaccadeCache, SaccadeCacheLayer
from saccade.hf.compress_text import CompressedText, compress_text
from saccade.hf.context import Context
from saccade.hf.continuous import continuous_batching
from saccade.hf.convert import converted_heads
from saccade.hf.load import LoadedModel, load_model
from saccade.hf.model import HFModel, rotary_frequencies
from saccade.hf.plan import plan
from saccade.hf.register import KEY, register

register()

__all__ = [
    "KEY",
    "Attached",
    "CompressedText",
    "Context",
    "HFModel",
    "LoadedModel",
    "SaccadeCache",
    "SaccadeCacheLayer",
    "attach",
    "compress_text",
    "continuous_batching",
    "converted_heads",
    "load_model",
    "plan",
    "register",
    "rotary_frequencies",
]
