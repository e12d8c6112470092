"""`saccade chat`: a dialogue without end in memory that does not grow."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from saccade.cli.dialogue import Dialogue, Messages, endless
from saccade.cli.failure import UsageError, need
from saccade.cli.generate import end_tokens, next_turn
from saccade.cli.sessions import DeferredInterrupt
from saccade.cli.shared_options import (
    CONTEXT,
    MODEL,
    SAMPLING,
    Values,
    context_params,
    model_option,
    n_predict_option,
    sampler_of,
    takes,
    with_flags,
)
from saccade.cli.streaming import TextStream
from saccade.units import as_bytes, significant

if TYPE_CHECKING:
    from saccade.hf.load import LoadedModel
    from saccade.runtime import Context

EXAMPLES = """examples:
  saccade chat --model smollm2
  saccade chat -m model.gguf --swa 4096 --sinks 4 --temperature 0.7
  saccade chat -m model.gguf -c 8192 -ctk int8 -ctv int8
  printf 'Hello!\\nAnd who are you?\\n' | saccade chat -m smollm2

Without options that bound the memory: a window of the last 2,048 tokens and 4 sinks.
"""
HELP = "/reset forgets the dialogue, /memory tells what is in use, /exit ends (so does Ctrl-D)."


@takes(sampling=SAMPLING, context=CONTEXT)
def run(
    model: Annotated[str, model_option(MODEL)],
    system: Annotated[str | None, typer.Option(
        "--system", metavar="TEXT", help="what the model reads before the dialogue"
    )] = None,
    n_predict: Annotated[Any, n_predict_option("most tokens of an answer")] = 256,
    *,
    sampling: Values,
    context: Values,
) -> int:  # fmt: skip
    """Talk without end in memory that does not grow."""
    params, sampler = context_params(context), sampler_of(sampling)
    need("transformers", purpose="saccade chat")
    need("rich", purpose="saccade chat")
    from saccade.core import BadInput, Unsupported

    print(f"Loading {model} ...", file=sys.stderr, flush=True)
    from saccade.hf.context import Context
    from saccade.hf.load import load_model

    loaded = load_model(model)
    if loaded.tokenizer is None:
        raise UsageError(
            f"{loaded.name} has no tokenizer that can be read. Give a model that brings one."
        )
    params = endless(params, loaded.n_ctx_train)
    # A ring has its size; any other cache is allocated at once, so that it does not grow either.
    bounded = params.n_swa is not None or params.kv_policy is not None
    reserve = 0 if bounded else params.n_ctx or loaded.n_ctx_train
    try:
        with Context(loaded, params, reserve=reserve) as ctx:
            dialogue = Dialogue(
                ctx,
                lambda messages: encode(loaded, messages),
                lambda text: encode_next(loaded, text),
                sampler=sampler,
                stop=end_tokens(loaded),
                n_predict=n_predict,
                system=system,
            )
            talk(dialogue, loaded.tokenizer, lines())
    except (BadInput, Unsupported) as error:
        raise UsageError(with_flags(str(error))) from error
    return 0


def lines() -> Iterator[str]:
    """What the user says, line by line: asked for on a terminal, else read from stdin."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    print(HELP, file=sys.stderr)
    while True:
        try:
            yield input("> ")
        except EOFError:
            print(file=sys.stderr)
            return


def talk(dialogue: Dialogue, tokenizer: Any, said: Iterable[str]) -> None:
    """Answer every line, until there are no more or one is /exit."""
    for line in said:
        text = line.strip()
        if text == "/exit":
            return
        if text == "/reset":
            dialogue.reset()
            print("Forgotten.", file=sys.stderr)
        elif text == "/memory":
            print(memory_line(dialogue), file=sys.stderr)
        elif text.startswith("/"):
            print(f"There is no command {text.split()[0]}. {HELP}", file=sys.stderr)
        elif text:
            answer(dialogue, tokenizer, text)


def answer(dialogue: Dialogue, tokenizer: Any, text: str) -> None:
    """Show one answer as it comes; Ctrl-C ends the answer, not the dialogue."""
    from saccade.core import BadInput

    parts: list[str] = []
    interrupt = DeferredInterrupt()
    try:
        with interrupt:
            pieces = decoded(interrupt.until_stopped(dialogue.ask(text)), tokenizer)
            show(parts, pieces, dialogue)
    except KeyboardInterrupt:
        dialogue.spoiled()
        print("(interrupted)", file=sys.stderr)
    except BadInput as error:  # a message that is longer than the context
        dialogue.withdraw()
        print(with_flags(str(error)), file=sys.stderr)
        return
    dialogue.answered("".join(parts))


def decoded(tokens: Iterable[int], tokenizer: Any) -> Iterator[str]:
    """Text of the tokens as it becomes certain."""
    stream = TextStream(tokenizer)
    for token in tokens:
        yield stream.push(token)
    yield stream.flush()


def show(parts: list[str], pieces: Iterator[str], dialogue: Dialogue) -> None:
    """Text on stdout, and the memory: live on a terminal, else behind the answer on stderr."""
    if not sys.stdout.isatty():
        for piece in pieces:
            parts.append(piece)
            print(piece, end="", flush=True)
        print(flush=True)
        print(memory_line(dialogue), file=sys.stderr)
        return
    from rich.console import Console, Group
    from rich.live import Live
    from rich.text import Text

    def frame() -> Group:
        return Group(Text("".join(parts)), Text(memory_line(dialogue), style="dim"))

    with Live(
        get_renderable=frame, console=Console(), refresh_per_second=8, vertical_overflow="visible"
    ):
        parts.extend(pieces)


def memory_line(dialogue: Dialogue) -> str:
    """What is in use now."""
    from saccade.core.hardware import resident_memory

    ctx = dialogue.ctx
    resident = resident_memory()
    process = "" if resident is None else f", process {as_bytes(resident)}"
    again = f", read again {dialogue.rereads}x" if dialogue.rereads else ""
    return f"[cache {as_bytes(ctx.cache_bytes)}{process}; {ctx.seen:,} tokens{again}{speed(ctx)}]"


def speed(ctx: Context) -> str:
    """How fast answers come, where there were any."""
    if not ctx.stats.decode_seconds:
        return ""
    return f"; {significant(ctx.stats.decode_tokens / ctx.stats.decode_seconds)} tokens/s"


def encode(loaded: LoadedModel, messages: Messages) -> list[int]:
    """Tokens of a dialogue that waits for an answer, in the model's template where it has one."""
    tokenizer: Any = loaded.tokenizer
    if not getattr(tokenizer, "chat_template", None):
        return list(tokenizer("\n".join(m["content"] for m in messages) + "\n").input_ids)
    chat = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(chat, add_special_tokens=False).input_ids)


def encode_next(loaded: LoadedModel, text: str) -> list[int]:
    """Tokens of one more message behind an answer."""
    tokenizer: Any = loaded.tokenizer
    has_template = getattr(tokenizer, "chat_template", None)
    more = next_turn(tokenizer, text) if has_template else f"\n{text}\n"
    return list(tokenizer(more, add_special_tokens=False).input_ids)
