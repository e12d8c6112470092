"""`saccade generate`: continue a prompt, under any ContextParams, token by token."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from saccade.cli import shared_options
from saccade.cli.failure import UsageError, need
from saccade.cli.loading import load
from saccade.cli.outputs import file_option
from saccade.cli.sessions import DeferredInterrupt, Session
from saccade.cli.tokens import (
    encode_messages,
    encode_next_message,
    encode_text,
    end_tokens,
    tokenizer_of,
)
from saccade.cli.values import file_name, utf8_text
from saccade.units import as_bytes, significant

if TYPE_CHECKING:
    from saccade.hf.load import LoadedModel
    from saccade.runtime import Context, GeneratedToken, Sampler, Stats

EXAMPLES = """examples:
  saccade generate --model smollm2 --prompt "Why is the sky blue?"
  saccade generate -m model.gguf -f book.txt --swa 1024 --sinks 4 -n 200
  saccade generate -m smollm2 --prompt-file book.txt --session book.session
  saccade generate -m smollm2 --session book.session --prompt "Who did it?"
  cat long.txt | saccade generate -m smollm2 -f - -c 16384 --rope-scaling yarn
"""


@shared_options.takes(sampling=shared_options.SAMPLING, context=shared_options.CONTEXT)
def run(
    model: shared_options.Model,
    device: shared_options.Device = "auto",
    dtype: shared_options.DType = "auto",
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
    *,
    sampling: shared_options.Values,
    context: shared_options.Values,
) -> int:  # fmt: skip
    """Continue a prompt, with any of the techniques."""
    saved = None if session is None else Session(session)
    text = read_prompt(prompt, prompt_file, optional=saved is not None and saved.exists)
    params = shared_options.context_params(context)
    need("transformers", purpose="saccade generate")
    from saccade.core import BadInput, Unsupported

    sampler = shared_options.sampler_of(sampling)
    loaded = load(model, device, dtype)
    from saccade.hf.context import Context

    try:
        with Context(loaded, params) as ctx:
            if saved is not None and saved.exists:
                sampler = shared_options.sampler_of(sampling, saved.load(ctx))
            elif saved is not None:
                saved.check(ctx)
            follows = saved is not None and saved.exists and ctx.seen > 0
            tokens = encode(loaded, text, raw=raw, follows=follows) if text else []
            generated = ctx.stream(
                tokens, n_predict=n_predict, sampler=sampler, stop=end_tokens(loaded)
            )
            return _print(ctx, generated, sampler, loaded, saved)
    except (BadInput, Unsupported) as error:  # a prompt too long, say
        raise UsageError(shared_options.with_flags(str(error))) from error


def _print(
    ctx: Context, generated: Iterator[GeneratedToken], sampler: Sampler, loaded: LoadedModel,
    session: Session | None,
) -> int:  # fmt: skip
    """Print what comes and what it took; with a session, Ctrl-C ends it between two tokens."""
    interrupt = DeferredInterrupt() if session is not None else None
    came = False

    def written() -> Iterator[int]:
        nonlocal came
        for each in generated:
            came = True
            yield each.token

    tokens = written()
    try:
        if interrupt is None:
            _print_text(tokens, loaded.tokenizer)
        else:
            with interrupt:
                _print_text(interrupt.until_stopped(tokens), loaded.tokenizer)
    except Exception:  # the context is full, or nobody reads the output any more
        if session is not None and came:
            with contextlib.suppress(Exception):  # what stopped the text is what to say
                session.save(ctx, sampler)
        raise
    finally:
        if ctx.stats.prompt_tokens or ctx.stats.decode_tokens:
            print(stats_line(ctx.stats), file=sys.stderr)
    if session is not None:
        session.save(ctx, sampler)
    if interrupt is not None and interrupt.stopped:
        raise KeyboardInterrupt
    return 0


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
        try:
            text = _read_bytes(file).decode()
        except UnicodeDecodeError as error:
            raise UsageError(f"{where} is not UTF-8 text (at byte {error.start}).") from None
    if not text.strip():
        raise UsageError(f"the prompt is empty: {where} has no text to continue.")
    return text


def _read_bytes(name: str) -> bytes:
    try:
        if name == "-":
            found = sys.stdin.buffer.read(_LONGEST + 1)
        else:
            with Path(name).expanduser().open("rb") as file:
                found = file.read(_LONGEST + 1)
    except OSError as error:
        raise UsageError(f"--prompt-file {name} cannot be read: {error.strerror}.") from None
    if len(found) > _LONGEST:
        raise UsageError(f"--prompt-file {name} has no end within 256 MiB: give a shorter text.")
    return found


_LONGEST = 2**28  # a device such as /dev/zero never ends


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


def stats_line(stats: Stats) -> str:
    """What it took, on one line."""
    read = _rate("prompt", stats.prompt_tokens, stats.prefill_seconds)
    written = _rate("more", stats.decode_tokens, stats.decode_seconds)
    return f"[{read}; {written}; cache {as_bytes(stats.cache_bytes)}]"


def _rate(what: str, tokens: int, seconds: float) -> str:
    speed = f" at {significant(tokens / seconds)} tokens/s" if tokens and seconds else ""
    return f"{tokens:,} {what} tokens{speed}"


def _print_text(tokens: Iterable[int], tokenizer: Any) -> None:
    from saccade.cli.streaming import TextStream

    stream, started = TextStream(tokenizer), False
    try:
        for token in tokens:
            started = True
            print(stream.push(token), end="", flush=True)
    finally:
        if started:
            print(stream.flush(), flush=True)
