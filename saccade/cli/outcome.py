"""How a run of a model came out: what it took, why it ended, and the same as JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from saccade.cli.context_length import in_force
from saccade.units import as_bytes, significant

if TYPE_CHECKING:
    from saccade.runtime import Context, Sampler, Stats

ENDLESS = "--swa 1024 --sinks 4 writes text without end"


def stats_line(stats: Stats, where: str, written: int) -> str:
    """What it took, on one line.

    Args:
        where: device and dtype.
        written: tokens that were shown.
    """
    parts = [_rate("prompt tokens", stats.prompt_tokens, stats.prefill_tps)]
    if stats.ttft_seconds is not None:
        parts.append(f"first token after {significant(stats.ttft_seconds)} s")
    parts.append(_rate("tokens written", written, stats.decode_tps))
    if stats.accepted_length is not None:
        mean = significant(stats.accepted_length)
        parts.append(f"{stats.accepted:,} of {stats.drafted:,} drafted accepted, {mean} at once")
    if stats.cache_bytes:
        parts.append(f"cache {as_bytes(stats.cache_bytes)}")
    return f"[{'; '.join(parts)}; {where}]"


def _rate(what: str, tokens: int, speed: float | None) -> str:
    at = f" at {significant(speed)} tokens/s" if tokens and speed else ""
    return f"{tokens:,} {what}{at}"


def where(ctx: Context) -> str:
    """Device and dtype of a running model: `cuda:0, bfloat16`."""
    dtype = str(ctx.model.facts.dtype).removeprefix("torch.")
    return f"{ctx.model.device}, {dtype}"


def why(reason: str | None, ctx: Context, *, written: int, n_predict: int) -> str | None:
    """The sentence why text ended, None after an interrupt."""
    if reason == "stop":
        return "Ended: the model ended its answer."
    if reason == "length":
        return f"Ended at --n-predict {n_predict}: raise it for more."
    if reason == "context":
        return (
            f"Ended after {written:,} of {n_predict:,} tokens, because the context of "
            f"{ctx.n_ctx:,} tokens is full. Raise --ctx-size, forget the middle of the text with "
            f"--keep 4, or set a window: {ENDLESS}."
        )
    return None


def as_record(
    ctx: Context, sampler: Sampler, *, name: str, text: str, tokens: int, notes: list[str]
) -> dict[str, Any]:
    """The text and what it took, for `--json`."""
    device, _, dtype = where(ctx).partition(", ")
    stats, drawn = ctx.stats, ("temperature", "top_k", "top_p", "seed")
    return {
        "text": text,
        "tokens": tokens,
        "finish_reason": ctx.finish_reason or "interrupted",
        "prompt_tokens": stats.prompt_tokens,
        "ttft_seconds": stats.ttft_seconds,
        "prefill_tps": stats.prefill_tps,
        "decode_tps": stats.decode_tps,
        "drafted": stats.drafted,
        "accepted": stats.accepted,
        "accepted_length": stats.accepted_length,
        "cache_bytes": stats.cache_bytes,
        "context_tokens": len(ctx.tokens),
        "model": name,
        "device": device,
        "dtype": dtype,
        "n_ctx": None if ctx.params.n_swa is not None else ctx.n_ctx,
        "options": in_force(ctx.params),
        "sampling": {field: getattr(sampler, field) for field in drawn},
        "notes": notes,
    }
