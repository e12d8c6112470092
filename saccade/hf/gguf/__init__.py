"""GGUF files: every fact is used, known not to matter, named in a note, or refused.

| file | one idea |
|---|---|
| `file.py`, `shards.py` | keys and tensors of a file, or of all files of a split model |
| `facts.py` | keys by type, which remember that they were used |
| `rows.py`, `steps.py`, `rope.py` | the table: keys -> config of each architecture |
| `tensors.py` | parameter -> tensors, and what undoes the converter's changes |
| `described.py` | file -> config -> what makes each parameter |
| `weights.py` | the model with its weights, read one by one |

transformers has a loader of its own.  It drops what changes results (rotary factors, windows, soft
caps), and fills what it finds no tensor for with random numbers, without a word.
"""

from saccade.hf.gguf.described import Described, check_tensors, describe
from saccade.hf.gguf.weights import load_weights

__all__ = ["Described", "check_tensors", "describe", "load_weights"]
