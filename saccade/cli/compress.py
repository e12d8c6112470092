"""`saccade compress`: a text of fewer tokens, chosen by a model, for the same or another one."""

from __future__ import annotations

import re
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from saccade.cli import shared_options
from saccade.cli.failure import UsageError, check_streams, need, raised_by_us
from saccade.cli.lengths import length
from saccade.cli.loading import check_model, load, say_check
from saccade.cli.notes import Notes
from saccade.cli.outputs import check_outputs, file_option
from saccade.cli.reading import reading
from saccade.cli.texts import read_text
from saccade.cli.tokens import tokenizer_of
from saccade.cli.values import file_name, one_of, utf8_text
from saccade.report.numbers import as_duration
from saccade.units import significant

if TYPE_CHECKING:
    from saccade.hf.compress_text import CompressedText
    from saccade.hf.load import LoadedModel

EXAMPLES = """examples:
  saccade compress report.txt --to 2k --question "Who signed it?" > short.txt
  saccade compress report.txt --to 2048 --unit token --protect numbers
  cat *.log | saccade compress - --to 8k --unit chunk --out short.txt

Scores: received_attention, self_information, contrastive (with --question).
--protect takes names (numbers, urls, code, headings, quotes) or a regular
expression, and may be repeated. stdout is the text alone.
"""


def run(
    file: Annotated[str, typer.Argument(
        metavar="FILE|-", parser=file_name, help="UTF-8 text; - reads stdin"
    )],
    to: Annotated[Any, typer.Option(
        "--to", metavar="N", parser=length, help="most tokens of the result, such as 2048 or 2k"
    )],
    question: Annotated[str | None, typer.Option(
        "--question", metavar="TEXT", parser=utf8_text, help="what the text will be asked"
    )] = None,
    model: shared_options.Model = "smollm2",
    device: shared_options.Device = "auto",
    dtype: shared_options.DType = "auto",
    weights: shared_options.Weights = "file",
    score: Annotated[str | None, typer.Option(
        "--score", metavar="NAME",
        parser=one_of("received_attention", "self_information", "contrastive"),
        help="what makes a token important (default: contrastive where there is a question, "
        "else received_attention)",
    )] = None,
    unit: Annotated[str, typer.Option(
        "--unit", metavar="token|sentence|chunk", parser=one_of("token", "sentence", "chunk"),
        help="what is kept or dropped whole; a chunk has 32 tokens",
    )] = "sentence",
    protect: Annotated[list[str] | None, typer.Option(
        "--protect", metavar="REGEX|NAME", parser=utf8_text,
        help="units in which it is found are kept",
    )] = None,
    window: Annotated[Any, typer.Option(
        "--window", metavar="N", parser=length,
        help="tokens scored together (default: as many as fit into the context)",
    )] = None,
    overlap: Annotated[Any, typer.Option(
        "--overlap", metavar="N", parser=length,
        help="tokens that a window has of the one before (default: an eighth of it)",
    )] = None,
    out: Annotated[
        str | None, file_option("--out", "write the text here instead of stdout")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="only the text")] = False,
) -> int:  # fmt: skip
    """Keep the most important tokens or sentences of a text, in their order."""
    check_model(model)
    check_outputs({"--out": out})
    if out is None:
        check_streams()
    need("transformers", purpose="saccade compress")
    text = read_text(file, file)
    if not text.strip():
        raise UsageError(f"{file} is empty: there is no text to compress.")
    notes = Notes(quiet=quiet)
    loaded = load(model, device, dtype, weights, notes=notes)
    tokenizer_of(loaded)
    options = {
        "question": question, "score": score, "unit": unit, "protect": protect or (),
        "window": window, "overlap": overlap,
    }  # fmt: skip
    found = _compressed(loaded, text, to, options, notes)
    _write(found.text, out)
    _tell(found, to, out, notes)
    return 0


def _compressed(
    loaded: LoadedModel, text: str, to: int, options: dict[str, Any], notes: Notes
) -> CompressedText:
    from saccade.hf.compress_text import compress_text
    from saccade.hf.context import as_model
    from saccade.runtime import ContextParams

    on_gpu = loaded.model.device.type == "cuda"
    params = ContextParams(n_batch=shared_options.GPU_BATCH) if on_gpu else ContextParams()
    say_check(as_model(loaded), params, notes, reserve=0)
    try:
        with nullcontext() if notes.quiet else reading(least=params.n_batch) as show:
            return compress_text(loaded, text, to, **options, params=params, on_progress=show)
    except ValueError as error:
        if not raised_by_us(error):
            raise
        raise UsageError(_as_options(str(error))) from error


def _as_options(message: str) -> str:
    """A message about arguments of `compress_text`, about options instead."""
    found = re.sub(r"\b(score)='(\w+)'", r"--\1 \2", message)
    found = re.sub(r"\b(protect|window|overlap)=", r"--\1 ", found)
    return re.sub(r"^target_len=", "--to ", found)


def _write(text: str, out: str | None) -> None:
    """The text as it is: to a file, which is complete or not there, or to stdout."""
    if out is not None:
        from saccade.report.files import write_whole

        write_whole(Path(out).expanduser(), text)
        return
    ends = "\n" if sys.stdout.isatty() and not text.endswith("\n") else ""
    sys.stdout.buffer.write((text + ends).encode())
    sys.stdout.flush()


def _tell(found: CompressedText, to: int, out: str | None, notes: Notes) -> None:
    """What was kept, and what it cost."""
    if found.scores is None:
        notes.note(
            f"the text has {found.tokens:,} tokens, not more than --to {to}: it stays whole."
        )
    else:
        share = found.tokens / found.tokens_before
        windows = f" in {found.windows} windows" if found.windows > 1 else ""
        notes.say(
            f"{found.tokens_before:,} -> {found.tokens:,} tokens ({share:.0%}); scoring read "
            f"{found.tokens_read:,} tokens{windows} in {as_duration(found.seconds)}, "
            f"{significant(found.tokens_read / found.seconds)} tokens/s"
        )
    if out is not None:
        notes.say(f"Wrote {out}")
