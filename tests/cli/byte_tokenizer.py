"""A tokenizer whose tokens are bytes; 0 is special."""

from __future__ import annotations

from types import SimpleNamespace

from tokenizers import AddedToken, Tokenizer, decoders, models


def backend() -> Tokenizer:
    """GPT-2's spelling of bytes as characters, each the token of its byte; 0 is a special token."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    spelling = {byte: chr(byte) for byte in printable}
    spelling |= {byte: chr(256 + index) for index, byte in enumerate(others)}
    made = Tokenizer(models.BPE({character: byte for byte, character in spelling.items()}, []))
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(spelling[0])])
    return made


class Bytes:
    """What the commands use of a tokenizer of transformers.

    Args:
        chat_template: None for none; a template writes `<u>text` and `<a>` for what follows.
    """

    eos_token_id = 0

    def __init__(self, chat_template: str | None = None) -> None:
        self.chat_template = chat_template
        self.backend_tokenizer = backend()

    def __call__(self, text, add_special_tokens=True):
        return SimpleNamespace(input_ids=list(text.encode()))

    def apply_chat_template(self, messages, *, tokenize, add_generation_prompt):
        assert add_generation_prompt and messages[-1]["role"] == "user"
        return "".join(f"<{m['role'][0]}>{m['content']}\n" for m in messages) + "<a>"

    def decode(self, tokens, skip_special_tokens):
        return self.backend_tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens)
