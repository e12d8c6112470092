"""`saccade generate`: continue a prompt, under any ContextParams, token by token."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saccade.cli.context_options import add_context_options, context_params, in_flags
from saccade.cli.failure import need
from saccade.cli.parser import UsageError, number, whole_number
from saccade.cli.sessions import DeferredInterrupt, Session
from saccade.report.numbers import as_bytes, significant

if TYPE_CHECKING:
    from saccade.hf.load import LoadedModel
    from saccade.runtime import Context, GeneratedToken, Sampler, Stats

EXAMPLES = """examples:
  saccade generate --model smollm2 --prompt "Why is the sky blue?"
  saccade generate -m model.gguf --prompt-file book.txt --swa 1024 --sinks 4 -n 200
  saccade generate -m smollm2 --prompt-file book.txt --session book.session
  saccade generate -m smollm2 --session book.session --prompt "Who did it?"
  cat long.txt | saccade generate -m smollm2 --prompt-file - -c 16384 --rope-scaling yarn
"""


def add_arguments(parser: ArgumentParser) -> None:
    """The options of `saccade generate`."""
    parser.add_argument(
        "--model", "-m", metavar="PATH|NAME", required=True,
        help="a .gguf file, a folder saved by transformers, or a name (smollm2)",
    )  # fmt: skip
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", "-p", metavar="TEXT")
    prompt.add_argument("--prompt-file", "-f", metavar="FILE|-", help="UTF-8 text; - reads stdin")
    parser.add_argument(
        "--session", metavar="FILE",
        help="go on from this file where it exists; saved at the end and on Ctrl-C",
    )  # fmt: skip
    parser.add_argument(
        "--n-predict", "-n", metavar="N", type=whole_number(1), default=128,
        help="most tokens to write (default: %(default)s)",
    )  # fmt: skip
    add_sampling_options(parser)
    parser.add_argument("--raw", action="store_true", help="no chat template around the prompt")
    add_context_options(parser)


def add_sampling_options(parser: ArgumentParser) -> None:
    """How a token is chosen; what is not given stays as a session has it."""
    parser.add_argument(
        "--temperature", "--temp", metavar="T", type=number,
        help="0 always takes the most likely token (default)",
    )  # fmt: skip
    parser.add_argument("--top-k", metavar="N", type=whole_number(0))
    parser.add_argument("--top-p", metavar="P", type=number)
    parser.add_argument("--seed", "-s", metavar="N", type=whole_number(0))


def sampler_from(args: Namespace, saved: Sampler | None = None) -> Sampler:
    """The sampler that was asked for, or a saved one with the options given now."""
    from saccade.runtime import Sampler

    names = ("temperature", "top_k", "top_p", "seed")
    given = {n: getattr(args, n) for n in names if getattr(args, n) is not None}
    if saved is None:
        return Sampler(**given)
    sampler = Sampler(**{n: getattr(saved, n) for n in names} | given)
    if "seed" not in given:
        sampler.restore(saved.state())
    return sampler


def run(args: Namespace) -> int:
    """Check, load, stream, tell."""
    session = Session.asked_for(args)
    text = read_prompt(args, optional=session is not None and session.exists)
    params = context_params(args)
    need("transformers", purpose="saccade generate")
    from saccade.core import BadInput, Unsupported

    sampler = sampler_from(args)
    print(f"Loading {args.model} ...", file=sys.stderr, flush=True)
    from saccade.hf.context import Context  # transformers comes with it and takes seconds
    from saccade.hf.load import load_model

    loaded = load_model(args.model)
    try:
        with Context(loaded, params) as ctx:
            if session is not None and session.exists:
                sampler = sampler_from(args, session.load(ctx))
            follows = session is not None and session.exists and ctx.seen > 0
            tokens = encode(loaded, text, raw=args.raw, follows=follows) if text else []
            pieces = ctx.stream(
                tokens, n_predict=args.n_predict, sampler=sampler, stop=end_tokens(loaded)
            )
            return _tell(ctx, pieces, sampler, loaded, session)
    except (BadInput, Unsupported) as error:  # a prompt too long, say
        raise UsageError(in_flags(str(error))) from error


def _tell(
    ctx: Context, pieces: Iterator[GeneratedToken], sampler: Sampler, loaded: LoadedModel,
    session: Session | None,
) -> int:  # fmt: skip
    """Print what comes and what it took; with a session, Ctrl-C ends it between two tokens."""
    interrupt = DeferredInterrupt() if session is not None else None
    tokens = (piece.token for piece in pieces)
    try:
        if interrupt is None:
            _print_pieces(tokens, loaded.tokenizer)
        else:
            with interrupt:
                _print_pieces(interrupt.until_stopped(tokens), loaded.tokenizer)
    finally:
        if ctx.stats.prompt_tokens or ctx.stats.decode_tokens:
            print(stats_line(ctx.stats), file=sys.stderr)
    if session is not None:
        session.save(ctx, sampler)
    if interrupt is not None and interrupt.stopped:
        raise KeyboardInterrupt
    return 0


def read_prompt(args: Namespace, *, optional: bool = False) -> str:
    """The prompt as text, "" where none is given and none is needed.

    Raises:
        UsageError: missing, empty, or not UTF-8.
    """
    if args.prompt is None and args.prompt_file is None:
        if optional:
            return ""
        raise UsageError(
            "saccade generate: one of the arguments --prompt/-p --prompt-file/-f is required, "
            "except to go on with a --session that exists."
        )
    if args.prompt is not None:
        text, where = args.prompt, "--prompt"
    else:
        where = f"--prompt-file {args.prompt_file}"
        data = _read_bytes(args.prompt_file)
        try:
            text = data.decode()
        except UnicodeDecodeError as error:
            raise UsageError(f"{where} is not UTF-8 text (at byte {error.start}).") from None
    if not text.strip():
        raise UsageError(f"the prompt is empty: {where} has no text to continue.")
    return text


def _read_bytes(name: str) -> bytes:
    if name == "-":
        return sys.stdin.buffer.read()
    try:
        return Path(name).expanduser().read_bytes()
    except OSError as error:
        raise UsageError(f"--prompt-file {name} cannot be read: {error.strerror}.") from None


def encode(loaded: LoadedModel, text: str, *, raw: bool, follows: bool = False) -> list[int]:
    """Tokens of the prompt, inside the model's chat template where it has one.

    Args:
        follows: the text comes after an answer of the model, whose turn is ended first.
    """
    tokenizer = loaded.tokenizer
    if tokenizer is None:
        raise UsageError(
            f"{loaded.name} has no tokenizer that can be read. Give a model that brings one."
        )
    if raw or not getattr(tokenizer, "chat_template", None):
        return list(tokenizer(text, add_special_tokens=not follows).input_ids)
    if follows:
        chat = next_turn(tokenizer, text)
        return list(tokenizer(chat, add_special_tokens=False).input_ids)
    message = [{"role": "user", "content": text}]
    chat = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(chat, add_special_tokens=False).input_ids)


def next_turn(tokenizer: Any, text: str) -> str:
    """What the chat template puts behind an answer: its end, the new message, the next start."""
    answer = "\u2060answer\u2060"
    messages = [
        {"role": "user", "content": "question"},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": text},
    ]
    chat = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return chat[chat.rindex(answer) + len(answer) :] if answer in chat else text


def end_tokens(loaded: LoadedModel) -> set[int]:
    """Tokens that end an answer, from the generation config and the tokenizer."""
    config = getattr(loaded.model, "generation_config", None)
    ends: set[int] = set()
    for found in (getattr(config, "eos_token_id", None), loaded.tokenizer.eos_token_id):
        ends.update(found if isinstance(found, (list, tuple)) else [found])
    return {token for token in ends if token is not None}


def stats_line(stats: Stats) -> str:
    """What it took, on one line."""
    read = _rate("prompt", stats.prompt_tokens, stats.prefill_seconds)
    written = _rate("more", stats.decode_tokens, stats.decode_seconds)
    return f"[{read}; {written}; cache {as_bytes(stats.cache_bytes)}]"


def _rate(what: str, tokens: int, seconds: float) -> str:
    speed = f" at {significant(tokens / seconds)} tokens/s" if tokens and seconds else ""
    return f"{tokens:,} {what} tokens{speed}"


def _print_pieces(tokens: Iterable[int], tokenizer: Any) -> None:
    from saccade.cli.streaming import TextStream

    stream, started = TextStream(tokenizer), False
    try:
        for token in tokens:
            started = True
            print(stream.push(token), end="", flush=True)
    finally:
        if started:
            print(stream.flush(), flush=True)
