"""Every causal language model class of transformers, under saccade's options, as one table.

`python -m scripts.families` builds a tiny random model of each and compares it with transformers'
own eager attention; it writes docs/families.md and docs/families.json.  Names of model types as
arguments run those alone and print them.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from saccade.core import BadInput, Unsupported
from saccade.hf import Context, attach
from saccade.hf.check import check_eager
from saccade.hf.layers import layer_kinds
from saccade.hf.model import HFModel
from saccade.runtime import Context as AnyContext
from saccade.runtime import ContextParams, load_session, save_session
from scripts.family_configs import FAMILIES, tiny_config, tiny_model

LENGTH: Final = 40
PREFIX: Final = 36
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


def read(ctx: AnyContext, ids: Tensor) -> Tensor:
    """Logits `[t, vocab]` of tokens that are read in chunks, the last ones one by one."""
    prompt = len(ids) - LENGTH + PREFIX
    parts = [ids[:2], *ids[2:prompt].split(CHUNK), *ids[prompt:].split(1)]
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
    return "exact" if found < ROUNDING else f"WRONG: {found:.1g}"


def attached(family: Family) -> Outcome:
    """The model's own forward inside `attach`."""
    with attach(family.model):
        return judged(logits_of(family.model, family.ids, use_cache=False), family.reference)


def plain(family: Family) -> Outcome:
    """Chunks and steps through a Context."""
    with Context(family.model, check="off") as ctx:
        return judged(read(ctx, family.ids[0]), family.reference)


def checked(family: Family) -> Outcome:
    """What the self-check of a new Context says."""
    found = check_eager(HFModel(family.model))
    if found.refusal is not None:
        return f"refused: {found.refusal}"
    return "exact" if found.ok else f"WRONG: {found.gap:.1g} in {found.layer}"


def window(family: Family) -> Outcome:
    """`n_swa`, against eager attention under a 4-D mask."""
    with Context(family.model, ContextParams(n_swa=NARROW), check="off") as ctx:
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
    with Context(family.model, params, check="off") as ctx:
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
    with Context(family.model, ContextParams(type_k="int8", type_v="int8"), check="off") as ctx:
        ours = read(ctx, ids[0])
        assert ctx.cache_bytes
    theirs = logits_of(family.model, ids)
    found = float((ours - theirs).abs().mean() / theirs.std().clamp_min(1e-6))
    return "near" if found < QUANTIZED else f"WRONG: {found:.2g} on average"


def session(family: Family) -> Outcome:
    """Saved after a prompt, restored in another Context, read on."""
    ids = family.ids[0]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "session"
        with Context(family.model, check="off") as ctx:
            ctx.append(ids[:PREFIX])
            save_session(path, ctx)
        with Context(family.model, check="off") as ctx:
            load_session(path, ctx)
            ours = torch.cat([ctx.logits(ctx.append(part)) for part in ids[PREFIX:].split(1)])
    return judged(ours, family.reference[PREFIX:])


def shift(family: Family) -> Outcome:
    """Context shift in a model of one layer, where it is exact."""
    model = family.model
    if not any(kind.states for kind in layer_kinds(model.config)):
        with suppress(Exception):
            model = tiny_model(family.name, tiny_config(family.name, layers=1))
    if not model.config.get_text_config(decoder=True).num_hidden_layers:  # two a layer: 1 // 2
        model = family.model
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    ids, keep = family.ids[0], 4
    drop = (PREFIX - keep) // 2
    rest = torch.cat((ids[:keep], ids[keep + drop :]))
    theirs = referred(lambda: logits_of(model, rest[None]))[PREFIX - drop :]
    with Context(model, check="off") as ctx:
        ctx.append(ids[:PREFIX])
        ctx.shift(keep)
        assert ctx.seen == PREFIX - drop
        ours = torch.cat([ctx.logits(ctx.append(part)) for part in ids[PREFIX:].split(1)])
    if layers != 1:
        raise NoReference("no config of one layer")
    return judged(ours, theirs)


COLUMNS: Final[dict[str, Callable[[Family], Outcome]]] = {
    "attach": attached,
    "plain": plain,
    "check": checked,
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
        kind = "refused" if ours else f"CRASH: {Path(last.filename).name} "
        return f"{kind}: {error}" if ours else f"{kind}{_line(error)}"


def _line(error: Exception) -> str:
    return f"{type(error).__name__} {' '.join(str(error).split())[:160]}"


def row(name: str, columns: tuple[str, ...] = tuple(COLUMNS)) -> dict[str, Outcome]:
    """All cells of a model type."""
    try:
        family = Family(name)
    except Exception as error:
        return {
            "model": f"-: transformers cannot build or run it from its config alone: {_line(error)}"
        }
    return {column: outcome(family, column) for column in columns}


def settled(found: dict[str, Outcome]) -> dict[str, Outcome]:
    """A row in one line a text; one text for all columns where all say the same."""
    found = {column: " ".join(text.split()) for column, text in found.items()}
    texts = set(found.values())
    return {"model": texts.pop()} if len(texts) == 1 else found


def cell(found: dict[str, Outcome], column: str) -> Outcome:
    """What a row of the record says of a column."""
    return found["model"] if "model" in found else found[column]


def rendered(record: dict[str, Any]) -> str:
    """docs/families.md of a record."""
    rows: dict[str, dict[str, Outcome]] = record["families"]
    words = Counter(cell(found, "plain").partition(":")[0] for found in rows.values())
    counts = {"exact": words["exact"], "refused": words["refused"], "unbuilt": words["-"]}
    head = HEAD.format(**counts, version=record["transformers"])
    lines = [head, f"| type | {' | '.join(COLUMNS)} | |", "|---" * (len(COLUMNS) + 2) + "|"]
    sentences: dict[str, int] = {}
    for name, found in rows.items():
        parts = [cell(found, column).partition(": ") for column in COLUMNS]
        said = [_general(text, name) for word, _, text in parts if word in ("refused", "-")]
        notes = {str(sentences.setdefault(text, len(sentences) + 1)) for text in said}
        marks = [MARKS.get(word, word) for word, _, _ in parts]
        lines.append(f"| {name} | {' | '.join(marks)} | {' '.join(sorted(notes, key=int))} |")
    listed = [f"{number}. {said}" for said, number in sentences.items()]
    return "\n".join([*lines, "", "What `no` and `-` mean, by number:", "", *listed, ""])


def _general(said: str, name: str) -> str:
    """A sentence without the names of one family."""
    said = re.sub(rf"\b{name}\b", "TYPE", said)
    parts = "For|Attention|Embedding|LMHead|Model|Decoder"
    said = re.sub(rf"\b[A-Z]\w*(?:{parts})\w*\b", "CLASS", said)
    said = re.sub(r"\d+ of \d+ tokens", "N of M tokens", said)
    return re.sub(r"layer \d+|\d+ layers", "layer N", said)


MARKS: Final = {"exact": "yes", "near": "yes", "refused": "no"}
HEAD: Final = """# Families of models

Every causal language model class of transformers {version}, as a tiny random model, against
transformers' own eager attention: {exact} are exact, {refused} are refused before they read
anything, {unbuilt} cannot be built from a config alone.  `python -m scripts.families --write` makes
this page; a test compares it with the installed version.

`attach` is the model's own forward; the others go through a Context. `plain`: a prompt in chunks,
then token by token. `check`: the self-check of a new Context. `window`: `n_swa`. `yarn`: YaRN by
options. `int8`: a quantized cache, near instead of exact. `session`: saved, restored, read on.
`shift`: a context shift, in one layer. `yes`: equal up to rounding. `no`: refused by the sentence
of that number. `-`: transformers itself computes nothing to compare with.
"""
PAGE: Final = Path(__file__).parents[1] / "docs" / "families.md"
RECORD: Final = PAGE.with_suffix(".json")


def write(rows: dict[str, dict[str, Outcome]]) -> None:
    """Put rows into the record, and render the page."""
    known = json.loads(RECORD.read_text())["families"] if RECORD.exists() else {}
    known |= {name: settled(found) for name, found in rows.items()}
    families = {name: known[name] for name in sorted(known)}
    record = {"transformers": transformers.__version__, "families": families}
    RECORD.write_text(json.dumps(record, indent=1) + "\n")
    PAGE.write_text(rendered(record))


def main(words: list[str]) -> None:
    """Print rows; with --write, write them too."""
    names = [word for word in words if word != "--write"]
    rows: dict[str, dict[str, Outcome]] = {}
    for name in names or FAMILIES:
        rows[name] = row(name)
        for column, found in rows[name].items():
            print(f"{name:26} {column:8} {found[:240]}", flush=True)
    if "--write" in words:
        write(rows)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    main(sys.argv[1:])
