"""`saccade chat`: a dialogue of any length in constant memory."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from saccade.cli import shared_options
from saccade.cli.dialogue import Dialogue, endless, opening
from saccade.cli.failure import UsageError, need
from saccade.cli.loading import load
from saccade.cli.sessions import DeferredInterrupt
from saccade.cli.streaming import TextStream
from saccade.cli.tokens import encode_messages, end_tokens, tokenizer_of
from saccade.cli.values import utf8_text
from saccade.units import as_bytes, significant

if TYPE_CHECKING:
    from saccade.runtime import Context

EXAMPLES = """examples:
  saccade chat --model smollm2
  saccade chat -m model.gguf --swa 4096 --sinks 4 --temperature 0.7
  saccade chat -m model.gguf -c 8192 -ctk int8 -ctv int8
  printf 'Hello!\\nAnd who are you?\\n' | saccade chat -m smollm2

Without options that bound the memory: a window of the last 2,048 tokens and 4 sinks.
"""
HELP = "/reset forgets the dialogue, /memory shows what is in use, /exit ends (so does Ctrl-D)."


@shared_options.takes(sampling=shared_options.SAMPLING, context=shared_options.CONTEXT)
def run(
    model: shared_options.Model,
    device: shared_options.Device = "auto",
    dtype: shared_options.DType = "auto",
    system: Annotated[str | None, typer.Option(
        "--system", metavar="TEXT", parser=utf8_text,
        help="what the model reads before the dialogue",
    )] = None,
    n_predict: shared_options.NPredict = 256,
    *,
    sampling: shared_options.Values,
    context: shared_options.Values,
) -> int:  # fmt: skip
    """A dialogue of any length in constant memory."""
    params, sampler = shared_options.context_params(context), shared_options.sampler_of(sampling)
    need("transformers", purpose="saccade chat")
    need("rich", purpose="saccade chat")
    from saccade.core import BadInput, Unsupported

    loaded = load(model, device, dtype)
    from saccade.hf.context import Context

    tokenizer = tokenizer_of(loaded)
    params = endless(params, loaded.n_ctx_train)
    # A ring has its size; any other cache is allocated at once, so that it does not grow either.
    bounded = params.n_swa is not None or params.kv_policy is not None
    reserve = 0 if bounded else params.n_ctx or loaded.n_ctx_train
    try:
        with Context(loaded, params, reserve=reserve) as ctx:
            encode_messages(
                tokenizer, [*opening(system), {"role": "user", "content": "hi"}]
            )  # a template that fails, before a word
            dialogue = Dialogue(
                ctx=ctx, tokenizer=tokenizer, sampler=sampler, stop=end_tokens(loaded),
                n_predict=n_predict, system=system,
            )  # fmt: skip
            talk(dialogue, lines())
    except (BadInput, Unsupported) as error:
        raise UsageError(shared_options.with_flags(str(error))) from error
    return 0


def lines() -> Iterator[str]:
    """What the user says, line by line: asked for on a terminal, else read from stdin."""
    try:
        if not sys.stdin.isatty():
            yield from sys.stdin
            return
        print(HELP, file=sys.stderr)
        while True:
            yield input("> ")
    except EOFError:
        print(file=sys.stderr)
    except UnicodeDecodeError as error:
        raise UsageError(f"stdin is not UTF-8 text (at byte {error.start}).") from None


def talk(dialogue: Dialogue, said: Iterable[str]) -> None:
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
            answer(dialogue, text)


def answer(dialogue: Dialogue, text: str) -> None:
    """Show one answer as it comes; Ctrl-C ends the answer, not the dialogue."""
    from saccade.core import BadInput

    parts: list[str] = []
    interrupt = DeferredInterrupt()
    try:
        with interrupt:
            texts = decoded(interrupt.until_stopped(dialogue.ask(text)), dialogue.tokenizer)
            show(parts, texts, dialogue)
    except KeyboardInterrupt:
        dialogue.spoiled()
        print("(interrupted)", file=sys.stderr)
    except BadInput as error:  # a message that is longer than the context
        dialogue.withdraw()
        print(shared_options.with_flags(str(error)), file=sys.stderr)
        return
    dialogue.answered("".join(parts))


def decoded(tokens: Iterable[int], tokenizer: Any) -> Iterator[str]:
    """Text of the tokens as it becomes certain."""
    stream = TextStream(tokenizer)
    for token in tokens:
        yield stream.push(token)
    yield stream.flush()


def show(parts: list[str], texts: Iterator[str], dialogue: Dialogue) -> None:
    """Text on stdout, and the memory: live on a terminal, else behind the answer on stderr."""
    if not sys.stdout.isatty():
        for text in texts:
            parts.append(text)
            print(text, end="", flush=True)
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
        parts.extend(texts)


def memory_line(dialogue: Dialogue) -> str:
    """What is in use now."""
    from saccade.core.hardware import resident_memory

    ctx = dialogue.ctx
    memory = f"cache {as_bytes(ctx.cache_bytes)}, process {as_bytes(resident_memory())}"
    again = f", read again {dialogue.rereads}x" if dialogue.rereads else ""
    return f"[{memory}; {ctx.seen:,} tokens{again}{speed(ctx)}]"


def speed(ctx: Context) -> str:
    """How fast answers come, where there were any."""
    if not ctx.stats.decode_seconds:
        return ""
    return f"; {significant(ctx.stats.decode_tokens / ctx.stats.decode_seconds)} tokens/s"
