"""Byte-level BPE in a few lines, headers of files that hold it, and text of every kind."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path

PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
OTHERS = [byte for byte in range(256) if byte not in PRINTABLE]
LETTER = {byte: chr(byte) for byte in PRINTABLE}
LETTER |= {byte: chr(256 + index) for index, byte in enumerate(OTHERS)}
ENGLISH = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
NORMAL, CONTROL, USER_DEFINED, BYTE = 1, 3, 4, 6


def spelled(text):
    return "".join(LETTER[byte] for byte in text.encode())


def bpe(word, ranks):
    """Merge the adjacent pair of the lowest rank, the leftmost of equals, until there is none."""
    parts = list(word)
    while True:
        ranked = [(ranks[pair], i) for i, pair in enumerate(pairwise(parts)) if pair in ranks]
        if not ranked:
            return parts
        _, i = min(ranked)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def byte_level(pre="gpt-2", merges=(), extra=(), **more):
    """The header of a byte-level file: the letters, what the merges make, then (text, kind)s."""
    tokens = [*LETTER.values(), *dict.fromkeys(a + b for a, b in merges)]
    kinds = [NORMAL] * len(tokens) + [kind for _, kind in extra]
    return (
        {
            "general.architecture": "llama",
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.tokens": [*tokens, *(text for text, _ in extra)],
            "tokenizer.ggml.token_type": kinds,
            "tokenizer.ggml.merges": [f"{a} {b}" for a, b in merges],
        }
        | ({} if pre is None else {"tokenizer.ggml.pre": pre})
        | more
    )


def texts(size=100_000):
    """Text of every kind: code, digits, newlines, scripts, emoji, spaces, and what is no text."""
    source = Path(random.__file__).read_text(encoding="utf-8")
    rng = random.Random(0)
    parts = [
        "1.",
        "\n\n1.",
        "\n",
        "\n\n\n",
        " ",
        "  ",
        "   x",
        "\t",
        "\r\n",
        "2024",
        "3.14159",
        "½²①",
        "it's",
        "IT'S",
        "don't we'll",
        "été",
        "e\u0301",
        "naïve",
        "Straße",
        "中文，测试。",
        "日本語テスト",
        "한국어",
        "हिन्दी",
        "العربية ١٢٣",
        "עברית",
        "ไทย",
        "🙂",
        "👩‍👩‍👧‍👦",
        "🇩🇪",
        "\u200b",
        "\u00a0",
        "\u3000",
        "﷽",
        "—“”…",
        "f(x) = y;",
        "#include <a.h>",
        "__init__",
        "HTTPServer2",
        "\x00",
        "\x7f",
        "\x85",
        "\ufeff",
        "\U0001d7d8",
        "a" * 40,
        "!!!",
        "&&",
        "<think>",
        "foo_bar",
    ]
    mixed = "".join(rng.choice(parts) + rng.choice(("", "", " ", "\n")) for _ in range(size // 9))
    wild = "".join(chr(rng.choice((rng.randrange(0x20, 0x3000), rng.randrange(0xF900, 0x20000))))
                   for _ in range(size // 60))  # fmt: skip
    return [source, mixed, wild]
