"""`saccade generate`: continue a prompt, under any ContextParams, token by token."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from saccade.cli import shared_options
from saccade.cli.context_length import Room, as_saved, note_greedy, note_without_effect, reaching
from saccade.cli.failure import UsageError, check_streams, need
from saccade.cli.loading import check_model, load, say_check
from saccade.cli.notes import Notes
from saccade.cli.outputs import file_option
from saccade.cli.refusals import check_before_loading
from saccade.cli.sessions import Saved, Session
from saccade.cli.texts import read_text
from saccade.cli.tokens import (
    encode_messages,
    encode_next_message,
    encode_text,
    end_tokens,
    tokenizer_of,
)
from saccade.cli.values import file_name, utf8_text
from saccade.cli.writing import Writing

if TYPE_CHECKING:
    from saccade.hf.load import LoadedModel
    from saccade.runtime import ContextParams

EXAMPLES = """examples:
  saccade generate --model smollm2 --prompt "Why is the sky blue?"
  saccade generate -m model.gguf -f book.txt --swa 1024 --sinks 4 -n 200
  saccade generate -m smollm2 --prompt-file book.txt --session book.session
  saccade generate -m smollm2 --session book.session --prompt "Who did it?"
  cat long.txt | saccade generate -m smollm2 -f - --json --quiet | jq .text

Text beyond the trained length gets YaRN by itself (--rope-scaling none insists
on the model's positions); with --swa and --sinks it has no end. Ctrl-C and
SIGTERM save the --session, in the prompt too: the same call again reads on.
"""


@shared_options.takes(sampling=shared_options.SAMPLING, context=shared_options.CONTEXT)
def run(
    model: shared_options.Model,
    device: shared_options.Device = "auto",
    dtype: shared_options.DType = "auto",
    weights: shared_options.Weights = "file",
    prompt: Annotated[str | None, typer.Option(
        "--prompt", "-p", metavar="TEXT", parser=utf8_text, help="text to continue"
    )] = None,
    prompt_file: Annotated[str | None, typer.Option(
        "--prompt-file", "-f", metavar="FILE|-", parser=file_name,
        help="UTF-8 text; - reads stdin",
    )] = None,
    session: Annotated[str | None, file_option(
        "--session", "go on from this file where it exists; saved at the end and on Ctrl-C"
    )] = None,
    n_predict: shared_options.NPredict = 128,
    raw: Annotated[
        bool, typer.Option("--raw", help="no chat template around the prompt")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="only the text")] = False,
    as_json: Annotated[bool, typer.Option(
        "--json", help="one line of JSON: the text, why it ended, speeds, memory, options",
    )] = False,
    *,
    sampling: shared_options.Values,
    context: shared_options.Values,
) -> int:  # fmt: skip
    """Continue a prompt, with any of the techniques."""
    check_model(model)
    check_streams()
    notes = Notes(quiet=quiet, typed=context)
    saved = None if session is None else Session(session, notes)
    text = read_prompt(prompt, prompt_file, optional=saved is not None and saved.exists)
    measured = _measured(context)
    if measured is not None and saved is not None:
        raise UsageError(
            f"--sparse {measured} measures this prompt, which does not go with --session: that "
            "keeps one pattern. Name another, or for kascade a --sparse-plan that exists."
        )
    if measured is not None and context["n_draft"] is not None:
        raise UsageError(
            f"--draft needs the pattern that it drafts by, and --sparse {measured} measures this "
            "prompt. Name another, or for kascade a --sparse-plan that exists."
        )
    plan = context["sparse_plan"] if measured == KASCADE else None
    if measured is not None:
        context = {**context, "sparse": None, "sparse_plan": None}
    params = shared_options.context_params(context)
    need("transformers", purpose="saccade generate")
    later = saved is not None and saved.exists
    shared_options.sampler_of(sampling, later=later)  # refused before a model is loaded
    longest = None if later else len(text.encode()) + n_predict + _TEMPLATE
    check_before_loading((model, device, dtype, weights), params, context, longest=longest)
    loaded = load(model, device, dtype, weights, notes=notes)
    params = shared_options.for_device(params, context, loaded.model.device.type)
    where = "the prompt" if prompt_file is None else f"--prompt-file {prompt_file}"
    asked = _Asked(loaded, text, where, raw, n_predict, saved, notes, measured, plan)
    with shared_options.in_words_of_options(context):  # a prompt too long, say
        return _generate(asked, params, sampling, as_json=as_json)


_TEMPLATE = 1024  # tokens, more than a chat template puts around a prompt


class _Asked(NamedTuple):
    """What to write, apart from options."""

    loaded: LoadedModel
    text: str
    where: str
    raw: bool
    n_predict: int
    session: Session | None
    notes: Notes
    measured: str | None  # the sparse pattern that is made by measuring the prompt
    plan: str | None  # the file for a plan of Kascade


def _generate(
    asked: _Asked, params: ContextParams, sampling: dict[str, Any], *, as_json: bool
) -> int:
    from saccade.core.hardware import free_memory
    from saccade.hf.context import Context, as_model

    loaded, session, notes = asked.loaded, asked.session, asked.notes
    model = as_model(loaded)
    facts = model.facts
    saved = session.peek() if session is not None and session.exists else None
    if saved is not None:
        params = as_saved(params, saved.params, facts.n_ctx_train, notes)
    tokens, before, seen = _prompt(
        asked, Room(facts, params, free_memory(loaded.model.device)), saved
    )
    further = 0 if params.n_keep is not None else asked.n_predict
    note_without_effect(facts, params, notes, loaded.model.device)
    params = reaching(params, facts, seen + len(tokens) + further, notes)
    if asked.measured is not None:
        choose = _chosen if asked.measured == shared_options.AUTO else _calibrated
        params = choose(asked, tokens, params)
    reserve = _reserve(params, seen + len(tokens), further)
    say_check(model, params, notes, reserve=reserve)
    with Context(loaded, params, reserve=reserve) as ctx:
        going_on = session.load(ctx) if session is not None and saved is not None else None
        if session is not None and saved is None:
            session.check(ctx)
        sampler = shared_options.sampler_of(sampling, going_on)
        note_greedy(sampling, sampler, notes)
        return Writing(
            ctx=ctx, loaded=loaded, sampler=sampler, tokens=tokens, n_predict=asked.n_predict,
            stop=end_tokens(loaded), session=session, notes=notes, before=before, as_json=as_json,
        ).run()  # fmt: skip


KASCADE = "kascade"


def _measured(context: dict[str, Any]) -> str | None:
    """The pattern that is made by measuring the prompt; None where none is."""
    name, plan = context.get("sparse"), context.get("sparse_plan")
    if name == KASCADE and (plan is None or not Path(plan).expanduser().exists()):
        return KASCADE
    return name if name == shared_options.AUTO else None


def _chosen(asked: _Asked, tokens: list[int], params: ContextParams) -> ContextParams:
    """The params with the sparse pattern that pays for this prompt, said with its reason."""
    from saccade.hf.sparse_choice import choose_sparse

    loaded, notes = asked.loaded, asked.notes
    notes.say(f"Measuring which pattern pays for these {len(tokens):,} tokens ...")
    choice = choose_sparse(loaded, tokens, params)
    notes.note(f"--sparse auto: {choice.why}")
    return replace(params, sparse=choice.pattern)


def _calibrated(asked: _Asked, tokens: list[int], params: ContextParams) -> ContextParams:
    """The params with Kascade, calibrated on the beginning of the prompt."""
    from saccade.hf.kascade import calibrate_kascade
    from saccade.hf.sparse_choice import LONGEST
    from saccade.sparse import Kascade

    file, count = asked.plan, min(len(tokens), LONGEST)
    asked.notes.say(f"Calibrating Kascade on {count:,} tokens of the prompt ...")
    plan = calibrate_kascade(asked.loaded, tokens, params)
    kept = "--sparse-plan FILE keeps the plan" if file is None else f"the plan is in {file}"
    if file is not None:
        plan.save(Path(file).expanduser())
    anchors = ", ".join(map(str, plan.anchors))
    asked.notes.note(
        f"--sparse kascade: layers {anchors} of {len(plan.layers)} choose for the others, which "
        f"kept {plan.recall:.3f} of the attention's weight; {kept}."
    )
    return replace(params, sparse=Kascade(plan=plan))


def _prompt(asked: _Asked, room: Room, saved: Saved | None) -> tuple[list[int], int, int]:
    """(tokens of the prompt still to read, how many a session has of it, tokens it has in all)."""
    loaded, text, raw = asked.loaded, asked.text, asked.raw
    seen = 0 if saved is None else len(saved.tokens)
    if not text:
        return [], 0, seen
    room.check(tokenizer_of(loaded), text, asked.where, seen=0 if saved and saved.cut else seen)
    whole = tokens = encode(loaded, text, raw=raw, follows=seen > 0)
    if saved is not None and saved.cut and seen:
        whole, tokens = saved.unread(encode(loaded, text, raw=raw), whole)
        if len(tokens) == len(whole):
            asked.notes.note("the session ends inside a prompt; this one is read behind it.")
    if not whole:
        raise UsageError(f"the tokenizer of {loaded.name} makes no token of {asked.where}.")
    room.check_tokens(len(tokens), seen=seen)
    return tokens, len(whole) - len(tokens), seen


def _reserve(params: ContextParams, tokens: int, further: int) -> int:
    """Tokens to allocate caches for at once, so that too little memory is said before reading."""
    if params.n_swa is not None or params.kv_policy is not None:
        return 0
    return min(params.n_ctx or tokens + further, tokens + min(further, _AHEAD))


_AHEAD = 1024  # an answer of any length may be allowed, and is seldom written


def read_prompt(prompt: str | None, file: str | None, *, optional: bool = False) -> str:
    """The prompt as text, "" where none is given and none is needed.

    Raises:
        UsageError: missing, given twice, empty, or not UTF-8.
    """
    if prompt is not None and file is not None:
        raise UsageError("saccade generate: --prompt and --prompt-file both say it. Give one.")
    if prompt is None and file is None:
        if optional:
            return ""
        raise UsageError(
            "saccade generate: one of --prompt/-p and --prompt-file/-f is required, "
            "except to go on with a --session that exists."
        )
    if file is None:
        text, where = prompt or "", "--prompt"
    else:
        where = f"--prompt-file {file}"
        text = read_text(file, where)
    if not text.strip():
        raise UsageError(f"the prompt is empty: {where} has no text to continue.")
    return text


def encode(loaded: LoadedModel, text: str, *, raw: bool, follows: bool = False) -> list[int]:
    """Tokens of the prompt, inside the model's chat template where it has one.

    Args:
        follows: the text comes after an answer of the model, which is ended first.
    """
    tokenizer = tokenizer_of(loaded)
    if raw or not getattr(tokenizer, "chat_template", None):
        return encode_text(tokenizer, text, special=not follows)
    if follows:
        return encode_next_message(tokenizer, text)
    return encode_messages(tokenizer, [{"role": "user", "content": text}])
