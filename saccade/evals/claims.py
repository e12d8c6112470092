"""The figures of the chapter that this project implements, beside what a run measured.

Each reason is one sentence made of measured numbers and of the model's shape; nothing here knows a
model.  Against which row a claim is held is said in `measured`: the textbook's materialized scores
for flash attention and the window, the model with repeated KV heads for GQA and MQA.
"""

from __future__ import annotations

from saccade.evals.rows import FLASH, GQA, MHA, MQA
from saccade.report.comparison import Claim, Report, Row
from saccade.units import as_bytes, significant

NOT_MEASURED = "not measured in this run"


def claims_of(report: Report) -> list[Claim]:
    """All claims; those whose rows were not measured say so."""
    return [
        *_flash(report), *_gqa(report), *_mqa(report), *_window(report), *_yarn(report),
    ]  # fmt: skip


def _flash(report: Report) -> list[Claim]:
    book, flash, users = report.baseline_row(), report.row(FLASH), report.row(report.reference)
    memory = _saved(flash, book, "peak_bytes", "peak memory")
    speed = _speed(flash, book, "prefill_tps", "prefill")
    quality = _divergence(flash, report)
    return [
        Claim(technique=FLASH, quantity="memory saved", claimed="50 %", measured=memory,
              reason=_scores(report, flash, book)),
        Claim(technique=FLASH, quantity="speed-up", claimed="2-4x", measured=speed,
              reason=_already(report, flash, book, users)),
        Claim(technique=FLASH, quantity="effect on quality", claimed="none", measured=quality,
              reason="it computes the same sums in another order, so only rounding differs"
              if flash else _missing(report, FLASH)),
    ]  # fmt: skip


def _scores(report: Report, flash: Row | None, book: Row | None) -> str:
    """What materialized scores take, of all that reading the context takes."""
    if not (flash and book and flash.peak_bytes and book.peak_bytes):
        return _missing(report, FLASH, report.baseline)
    heads, batch, length = (
        report.model["query_heads"], report.settings["n_batch"], report.settings["n_context"],
    )  # fmt: skip
    matrix = heads * min(batch, length) * length * (2 if "16" in report.model["dtype"] else 4)
    return (
        f"what goes is the score matrix, {heads} heads x {min(batch, length):,} x {length:,} = "
        f"{as_bytes(matrix)} and its copies, of a peak of {as_bytes(book.peak_bytes)}; "
        f"{as_bytes(flash.peak_bytes)} of keys and activations stay, and the share that goes grows "
        "with the tokens read at once"
    )


def _already(report: Report, flash: Row | None, book: Row | None, users: Row | None) -> str:
    if not (flash and book and flash.prefill_tps and book.prefill_tps):
        return _missing(report, FLASH, report.baseline)
    if users is None or users is book or not users.prefill_tps:
        return "a whole forward pass is timed, of which attention is a part"
    return (
        f"a whole forward pass is timed, of which attention is a part; {users.name}, which is what "
        f"users have, is already {_times(users.prefill_tps / book.prefill_tps)} the textbook, and "
        f"flash attention {_times(flash.prefill_tps / users.prefill_tps)} of that"
    )


def _gqa(report: Report) -> list[Claim]:
    heads, kv_heads = report.model["query_heads"], report.model["kv_heads"]
    return _fewer_heads(report, GQA, "75 %", "1.5x", (
        f"{heads} query heads over {kv_heads} KV heads can save "
        f"{100 * (1 - kv_heads / heads):.0f} % of the cache"
    ))  # fmt: skip


def _mqa(report: Report) -> list[Claim]:
    mqa, heads = report.row(MQA), report.model["query_heads"]
    changed = "the model was trained with its own heads; converted ones need training to follow"
    return [
        *_fewer_heads(report, MQA, "97 %", "2x", (
            f"one KV head for {heads} query heads can save {100 * (1 - 1 / heads):.0f} % of the "
            "cache"
        )),
        Claim(technique=MQA, quantity="effect on quality", claimed="moderate",
              measured=_perplexity(mqa, report),
              reason=changed if mqa and mqa.perplexity else _missing(report, MQA)),
    ]  # fmt: skip


def _fewer_heads(report: Report, name: str, saved: str, faster: str, shape: str) -> list[Claim]:
    """Cache and decoding beside those of the same model with a KV head for every query head."""
    few, many = report.row(name), report.row(MHA)
    return [
        Claim(technique=name, quantity="memory saved", claimed=saved,
              measured=_saved(few, many, "cache_bytes", "cache"),
              reason=shape if few and many else _missing(report, name, MHA)),
        Claim(technique=name, quantity="speed-up", claimed=faster,
              measured=_speed(few, many, "decode_tps", "decode"),
              reason=_bytes_read(report, few, many)),
    ]  # fmt: skip


def _bytes_read(report: Report, few: Row | None, many: Row | None) -> str:
    """What a token reads: all weights, and the cache, which alone became smaller."""
    if not (few and many and few.cache_bytes and many.cache_bytes):
        return _missing(report, GQA, MQA, MHA)
    weights = report.model["weight_bytes"]
    most = (weights + many.cache_bytes) / (weights + few.cache_bytes)
    return (
        f"a token reads {as_bytes(weights)} of weights whatever the heads, and "
        f"{as_bytes(few.cache_bytes)} instead of {as_bytes(many.cache_bytes)} of keys and values: "
        f"by the bytes alone {_times(most)}, more with longer contexts"
    )


def _window(report: Report) -> list[Claim]:
    found = [row for row in report.rows if _is_window(row)]
    row = next((row for row in found if row.status == "ok"), None)
    book, flash = report.baseline_row(), report.row(FLASH)
    name = next((each.name for each in (row, *found) if each), "sliding window")
    size = as_bytes(row.cache_bytes) if row and row.cache_bytes else NOT_MEASURED
    reason = _missing(report, name)
    if row and flash and row.cache_bytes and flash.cache_bytes:
        reason = (
            f"all keys take {as_bytes(flash.cache_bytes)} at {report.settings['n_context']:,} "
            f"tokens and grow with the text; {_by_length(report)}"
        )
    speed = _missing(report, name, report.baseline)
    if row and flash and row.prefill_tps and flash.prefill_tps:
        speed = (
            f"of that, the window itself is {_times(row.prefill_tps / flash.prefill_tps)} flash "
            "attention over all keys; it gains with the length of the text"
        )
    lost = "what lies outside of the window is forgotten"
    return [
        Claim(technique=name, quantity="memory", claimed="fixed size", measured=size,
              reason=reason),
        Claim(technique=name, quantity="speed-up", claimed="1.2x",
              measured=_speed(row, book, "prefill_tps", "prefill"), reason=speed),
        Claim(technique=name, quantity="effect on quality", claimed="depends on the window",
              measured=_perplexity(row, report),
              reason=lost if row else _missing(report, name)),
    ]  # fmt: skip


def _is_window(row: Row) -> bool:
    return "n_swa" in row.options and not row.parts


def _by_length(report: Report) -> str:
    """Whether the sweep shows that a window's cache stays as it is."""
    points = [p for p in report.sweep if p.name.startswith("window") and p.cache_bytes]
    if len({p.n_context for p in points}) < 2:
        return "one length was measured: --sweep shows that this does not"
    sizes = ", ".join(f"{as_bytes(p.cache_bytes or 0)} at {p.n_context:,}" for p in points)
    return f"the sweep: {sizes}"


def _yarn(report: Report) -> list[Claim]:
    name = next((r.name for r in report.rows if r.name.startswith("YaRN x")), "YaRN")
    row, flash = report.row(name), report.row(FLASH)
    same = "it changes the angles of the positions, and nothing else is stored or computed"
    return [
        Claim(technique=name, quantity="memory saved", claimed="none",
              measured=_saved(row, flash, "peak_bytes", "peak memory"),
              reason=same if row and flash else _missing(report, name, FLASH)),
        Claim(technique=name, quantity="speed-up", claimed="none",
              measured=_speed(row, flash, "prefill_tps", "prefill"),
              reason=same if row and flash else _missing(report, name, FLASH)),
        _extrapolation(report, name, row, flash),
    ]  # fmt: skip


def _extrapolation(report: Report, name: str, row: Row | None, plain: Row | None) -> Claim:
    """Perplexity past the trained length with and without YaRN, from the rows or the curves."""
    trained = report.model["trained_length"]
    measured, reason = (
        NOT_MEASURED,
        (
            f"this run stays inside the {trained:,} tokens that the model was trained for; give a "
            "--context beyond them"
        ),
    )
    if missing := report.settings.get("missing_curves"):
        said = [f"perplexity by position, {name}: {why}" for name, why in missing.items()]
        reason = "; ".join(said)
    curves = {c.name.split(" x")[0]: c for c in report.curves if c.perplexity}
    past = "scaling" in report.settings
    if past and row and plain and row.perplexity and plain.perplexity:
        with_it, without = row.perplexity, plain.perplexity
    elif "YaRN" in curves and "plain" in curves:
        with_it, without = curves["YaRN"].perplexity[-1], curves["plain"].perplexity[-1]
    else:
        return Claim(technique=name, quantity="effect on quality",
                     claimed="better extrapolation", measured=measured, reason=reason)  # fmt: skip
    return Claim(
        technique=name,
        quantity="effect on quality",
        claimed="better extrapolation",
        measured=f"perplexity {significant(with_it)} instead of {significant(without)}",
        reason=f"positions beyond {trained:,} are angles that the model never saw; YaRN maps them "
        "onto those that it did",
    )


def _saved(row: Row | None, base: Row | None, field: str, what: str) -> str:
    """`71 % of the peak memory of transformers eager`."""
    value, whole = getattr(row, field, None), getattr(base, field, None)
    if row is None or base is None or value is None or not whole:
        return NOT_MEASURED
    share = round(100 * (1 - value / whole))
    less = f"{share} % of" if share >= 0 else f"none: {-share} % more than"
    return f"{less} the {what} of {base.name}"


def _speed(row: Row | None, base: Row | None, field: str, what: str) -> str:
    """`2.9x transformers eager in prefill`."""
    value, whole = getattr(row, field, None), getattr(base, field, None)
    if row is None or base is None or value is None or not whole:
        return NOT_MEASURED
    return f"{_times(value / whole)} {base.name} in {what}"


def _divergence(row: Row | None, report: Report) -> str:
    if row is None or row.kl is None:
        return NOT_MEASURED
    kl = "below 0.00001" if row.kl < 1e-5 else significant(row.kl, 2)
    return f"KL {kl} from {report.settings.get('divergence_from', report.reference)}"


def _perplexity(row: Row | None, report: Report) -> str:
    base = report.row(report.reference)
    if row is None or base is None or not (row.perplexity and base.perplexity):
        return NOT_MEASURED
    return f"perplexity {_times(row.perplexity / base.perplexity)} that of {base.name}"


def _times(ratio: float) -> str:
    return f"{significant(ratio, 3 if ratio >= 1 else 2)}x"


def _missing(report: Report, *names: str) -> str:
    """Why rows were not measured, as these rows say."""
    said = {row.name: row.note or row.status for row in report.rows if row.status != "ok"}
    found = [f"{name}: {said[name]}" for name in names if name in said]
    absent = [name for name in names if report.row(name) is None]
    return "; ".join(found) or f"this run has no row {' or '.join(absent or names)}"
