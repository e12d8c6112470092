"""Numbers of docs/speculation.md that the record of exact speculation says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from scripts.records import record, times


def _speculation(length: str, *words: str) -> list[dict[str, Any]]:
    rows = [r for r in record("speculation")["rows"] if r["name"].startswith(length)]
    return [r for r in rows if all(word in r["name"] for word in words)]


def _speculation_ms() -> dict[str, float]:
    rows = record("speculation")["rows"]
    return next(r["ms"] for r in rows if r["name"].endswith("16,000 tokens"))


def speculation_steps() -> str:
    """A dense step of nine tokens by one of a single token, of the whole model."""
    ms = _speculation_ms()
    return f"{ms['9 tokens at once'] / ms['a dense step']:.1f} times as long as for one"


def speculation_draft() -> str:
    """Steps under the patterns by the dense one."""
    ms = _speculation_ms()
    shares = [ms[f"a step of {name}"] / ms["a dense step"] for name in ("BlockTopK", "Quest")]
    return f"{min(shares):.2f} to {max(shares):.2f} of a dense step"


def speculation_rejected() -> str:
    """Share of four drafted tokens that were not accepted, over all rows."""
    rows = _speculation("", "4 drafted")
    drafted, accepted = (sum(r[name] for r in rows) for name in ("drafted", "accepted"))
    return f"{100 * (1 - accepted / drafted):.0f} %"


def _speculation_speed(length: str) -> str:
    return times([r["speed"] for r in _speculation(length, "4 drafted")])


def speculation_eight_drafted() -> str:
    """Speed with eight drafted tokens by that without, over all rows."""
    return times([r["speed"] for r in _speculation("", "8 drafted")])


def speculation_8k() -> str:
    """Speed with four drafted tokens by that without, behind 8,000."""
    return _speculation_speed("8,000")


def speculation_16k() -> str:
    """The same behind 16,000."""
    return _speculation_speed("16,000")


SPECULATION_FACTS: dict[str, Callable[[], str]] = {
    f.__name__: f
    for f in (
        speculation_steps,
        speculation_draft,
        speculation_rejected,
        speculation_eight_drafted,
        speculation_8k,
        speculation_16k,
    )
}
