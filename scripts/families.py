"""Every causal language model class of transformers, under saccade's options, as one table.

`python -m scripts.families` builds a tiny random model of each and compares it with transformers'
own eager attention; it writes docs/families.md and docs/families.json.  Names of model types as
arguments run those alone and print them.
"""

from __future__ import annotations

import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from transformers import PreTrainedModel

from saccade.core import BadInput, Unsupported
from saccade.hf import Context, attach
from saccade.hf.layers import layer_kinds
from saccade.runtime import ContextParams, load_session, save_session
from scripts.family_configs import FAMILIES, tiny_config, tiny_model

LENGTH: Final = 40
PREFIX: Final = 30
CHUNK: Final = 13
NARROW: Final = 6
"""`n_swa` of the window column, below the models' own windows."""
ROUNDING: Final = 1e-4
"""Largest gap of logits that counts as exact, in units of their standard deviation."""
QUANTIZED: Final = 0.3
"""The same for an int8 cache: of the mean gap."""

Outcome = str
"""`exact`, `refused: SENTENCE`, `WRONG: GAP`, `CRASH: ERROR`, or `-: why there is no reference`."""


class NoReference(Exception):
    """transformers itself cannot compute what a cell would be compared with."""


class Family:
    """One model type: its model and what transformers' eager attention says of some tokens."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.model = tiny_model(name, tiny_config(name))
        self.ids = torch.randint(3, 120, (1, LENGTH), generator=torch.Generator().manual_seed(1))
        self.reference = logits_of(self.model, self.ids)


@torch.no_grad()
def logits_of(model: PreTrainedModel, ids: Tensor, **options: Any) -> Tensor:
    """Logits `[t, vocab]` of all tokens in one forward pass."""
    return model(ids, **options).logits[0]


def read(ctx: Context, ids: Tensor) -> Tensor:
    """Logits `[t, vocab]` of tokens that are read in chunks, then one by one."""
    parts = [ids[:2], *ids[2:PREFIX].split(CHUNK), *ids[PREFIX:].split(1)]
    return torch.cat(
        [ctx.logits(ctx.append(part, wanted=len(part))) for part in parts if len(part)]
    )


def gap(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference in units of the standard deviation; inf where there is a NaN."""
    found = (ours - theirs).abs().max() / theirs.std().clamp_min(1e-6)
    return float(found) if bool(found.isfinite()) else float("inf")


def judged(ours: Tensor, theirs: Tensor) -> Outcome:
    """`exact`, or WRONG with the gap."""
    found = gap(ours, theirs)
    return "exact" if found < ROUNDING else f"WRONG: {found:.2g}"


def attached(family: Family) -> Outcome:
    """The model's own forward inside `attach`."""
    with attach(family.model):
        return judged(logits_of(family.model, family.ids, use_cache=False), family.reference)


def plain(family: Family) -> Outcome:
    """Chunks and steps through a Context."""
    with Context(family.model) as ctx:
        return judged(read(ctx, family.ids[0]), family.reference)


def window(family: Family) -> Outcome:
    """`n_swa`, against eager attention under a 4-D mask."""
    with Context(family.model, ContextParams(n_swa=NARROW)) as ctx:
        ours = read(ctx, family.ids[0])
    back = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
    hidden = (back < 0) | (back >= NARROW)
    mask = torch.zeros(1, 1, LENGTH, LENGTH).masked_fill(hidden, torch.finfo(torch.float32).min)
    theirs = referred(lambda: logits_of(family.model, family.ids, attention_mask=mask))
    return judged(ours, theirs)


def yarn(family: Family) -> Outcome:
    """YaRN by options, against a model that was built with it."""
    params = ContextParams(
        rope_scaling_type="yarn", rope_freq_scale=0.25, yarn_orig_ctx=16, n_ctx=512
    )
    with Context(family.model, params) as ctx:
        ours = read(ctx, family.ids[0])
    return judged(ours, referred(lambda: logits_of(scaled(family), family.ids)))


def scaled(family: Family) -> PreTrainedModel:
    """The same weights with YaRN in the config, as transformers reads it."""
    config = tiny_config(family.name)
    text = config.get_text_config(decoder=True)
    rule = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    if hasattr(text, "original_max_position_embeddings"):
        text.original_max_position_embeddings = 16
    given = text.rope_parameters
    if "rope_theta" in given:
        text.rope_parameters = {**given, **rule}
    else:
        text.rope_parameters = {**given, "full_attention": {**given["full_attention"], **rule}}
    model = tiny_model(family.name, config)
    model.load_state_dict(family.model.state_dict())
    return model


def int8(family: Family) -> Outcome:
    """Quantized keys and values: near, not equal."""
    ids = torch.randint(3, 120, (1, 160), generator=torch.Generator().manual_seed(2))
    with Context(family.model, ContextParams(type_k="int8", type_v="int8")) as ctx:
        ours = read(ctx, torch.cat((ids[0, :PREFIX], ids[0, PREFIX:])))
        assert ctx.cache_bytes
    theirs = logits_of(family.model, ids)
    found = float((ours - theirs).abs().mean() / theirs.std().clamp_min(1e-6))
    return "near" if found < QUANTIZED else f"WRONG: {found:.2g} on average"


def session(family: Family) -> Outcome:
    """Saved after a prompt, restored in another Context, read on."""
    ids = family.ids[0]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "session"
        with Context(family.model) as ctx:
            ctx.append(ids[:PREFIX])
            save_session(path, ctx)
        with Context(family.model) as ctx:
            load_session(path, ctx)
            ours = torch.cat([ctx.logits(ctx.append(part)) for part in ids[PREFIX:].split(1)])
    return judged(ours, family.reference[PREFIX:])


def shift(family: Family) -> Outcome:
    """Context shift in a model of one layer, where it is exact."""
    try:
        model = tiny_model(family.name, tiny_config(family.name, layers=1))
    except Exception:
        model = family.model
    if any(kind.states for kind in layer_kinds(family.model.config)):
        model = family.model
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    ids, keep, drop = family.ids[0], 4, 13
    with Context(model) as ctx:
        ctx.append(ids[:PREFIX])
        ctx.shift(keep)
        assert ctx.seen == PREFIX - drop
        ours = torch.cat([ctx.logits(ctx.append(part)) for part in ids[PREFIX:].split(1)])
    if layers != 1:
        raise NoReference("no config of one layer")
    rest = torch.cat((ids[:keep], ids[keep + drop :]))
    theirs = referred(lambda: logits_of(model, rest[None]))[PREFIX - drop :]
    return judged(ours, theirs)


COLUMNS: Final[dict[str, Callable[[Family], Outcome]]] = {
    "attach": attached,
    "plain": plain,
    "window": window,
    "yarn": yarn,
    "int8": int8,
    "session": session,
    "shift": shift,
}


def referred(compute: Callable[[], Tensor]) -> Tensor:
    """What transformers says; NoReference where it fails."""
    try:
        return compute()
    except Exception as error:
        raise NoReference(f"transformers fails: {type(error).__name__}") from error


def outcome(family: Family, column: str) -> Outcome:
    """One cell."""
    try:
        return COLUMNS[column](family)
    except NoReference as error:
        return f"-: {error}"
    except (Unsupported, BadInput) as error:
        return f"refused: {error}"
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        ours = "/saccade/" in last.filename and isinstance(error, ValueError | TypeError)
        kind = "refused" if ours else f"CRASH: {Path(last.filename).name}:{last.lineno} "
        return f"{kind}: {type(error).__name__} {error}"


def row(name: str, columns: tuple[str, ...] = tuple(COLUMNS)) -> dict[str, Outcome]:
    """All cells of a model type."""
    try:
        family = Family(name)
    except Exception as error:
        return {"model": f"-: transformers cannot build or run it from its config alone: {error}"}
    return {column: outcome(family, column) for column in columns}


def main(names: list[str]) -> None:
    """Print or write the rows."""
    for name in names or FAMILIES:
        for column, found in row(name).items():
            print(f"{name:26} {column:8} {found[:240]}", flush=True)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    main(sys.argv[1:])
