"""`saccade generate`: continue a prompt, under any ContextParams, token by token."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saccade.cli.context_options import add_context_options, context_params, in_flags
from saccade.cli.failure import need
from saccade.cli.parser import UsageError, number, whole_number
from saccade.report.numbers import as_bytes, significant

if TYPE_CHECKING:
    from saccade.hf.load import LoadedModel
    from saccade.runtime import Stats

EXAMPLES = """examples:
  saccade generate --model smollm2 --prompt "Why is the sky blue?"
  saccade generate -m model.gguf --prompt-file book.txt --swa 1024 --sinks 4 -n 200
  cat long.txt | saccade generate -m smollm2 --prompt-file - -c 16384 --rope-scaling yarn
"""


def add_arguments(parser: ArgumentParser) -> None:
    """The options of `saccade generate`."""
    parser.add_argument(
        "--model", "-m", metavar="PATH|NAME", required=True,
        help="a .gguf file, a folder saved by transformers, or a name (smollm2)",
    )  # fmt: skip
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", "-p", metavar="TEXT")
    prompt.add_argument("--prompt-file", "-f", metavar="FILE|-", help="UTF-8 text; - reads stdin")
    parser.add_argument(
        "--n-predict", "-n", metavar="N", type=whole_number(1), default=128,
        help="most tokens to write (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--temperature", "--temp", metavar="T", type=number, default=0.0,
        help="0 always takes the most likely token (default)",
    )  # fmt: skip
    parser.add_argument("--top-k", metavar="N", type=whole_number(0), default=0)
    parser.add_argument("--top-p", metavar="P", type=number, default=1.0)
    parser.add_argument("--seed", "-s", metavar="N", type=whole_number(0), default=0)
    parser.add_argument("--raw", action="store_true", help="no chat template around the prompt")
    add_context_options(parser)


def run(args: Namespace) -> int:
    """Check, load, stream, tell."""
    text = read_prompt(args)
    params = context_params(args)
    need("transformers", purpose="saccade generate")
    from saccade.core import BadInput, Unsupported
    from saccade.runtime import Sampler

    sampler = Sampler(
        temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, seed=args.seed
    )
    print(f"Loading {args.model} ...", file=sys.stderr, flush=True)
    from saccade.hf.context import Context  # transformers comes with it and takes seconds
    from saccade.hf.load import load_model

    loaded = load_model(args.model)
    tokens = encode(loaded, text, raw=args.raw)
    try:
        with Context(loaded, params) as ctx:
            pieces = ctx.stream(
                tokens, n_predict=args.n_predict, sampler=sampler, stop=end_tokens(loaded)
            )
            try:
                _print_pieces((piece.token for piece in pieces), loaded.tokenizer)
            finally:
                if ctx.stats.prompt_tokens:
                    print(stats_line(ctx.stats), file=sys.stderr)
    except (BadInput, Unsupported) as error:  # a prompt too long, say
        raise UsageError(in_flags(str(error))) from error
    return 0


def read_prompt(args: Namespace) -> str:
    """The prompt as text.

    Raises:
        UsageError: empty, or not UTF-8.
    """
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


def encode(loaded: LoadedModel, text: str, *, raw: bool) -> list[int]:
    """Tokens of the prompt, inside the model's chat template where it has one."""
    tokenizer = loaded.tokenizer
    if tokenizer is None:
        raise UsageError(
            f"{loaded.name} has no tokenizer that can be read. Give a model that brings one."
        )
    if raw or not getattr(tokenizer, "chat_template", None):
        return list(tokenizer(text).input_ids)
    message = [{"role": "user", "content": text}]
    chat = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(chat, add_special_tokens=False).input_ids)


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
