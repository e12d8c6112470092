"""A made-up record shaped like a real run: failed, stopped and partly measured rows."""

from __future__ import annotations

from saccade.report.comparison import Curve, Report, Row

MIB = 1024**2


def report() -> Report:
    """A fresh copy; tests may change it."""
    return Report(
        model={
            "name": "SmolLM2-135M-Instruct Q4_1",
            "architecture": "llama",
            "parameters": 134_515_008,
            "n_layers": 30,
            "n_heads": 9,
            "n_kv_heads": 3,
            "trained_length": 8192,
            "file_bytes": 98_700_000,
        },
        text={"source": "pydoc_data.topics", "characters": 704_112, "tokens": 112_874},
        revision="0123456789ab",
        command="saccade compare --quick",
        environment={
            "cpu": "Example CPU <9000> & co",
            "cores": 2,
            "threads": 2,
            "memory_bytes": 24 * 1024**3,
            "gpu": None,
            "python": "3.11.7",
            "torch": "2.13.0+cpu",
            "saccade": "0.1.0",
        },
        settings={"n_context": 4096, "n_scored": 1024, "quick": True, "dtype": "float32"},
        baseline="standard attention",
        date="2026-01-31T12:00:00+00:00",
        rows=_rows(),
        curves=_curves(),
        seconds=151.2,
        complete=False,
    )


def _row(name: str, group: str, numbers: tuple, **more: object) -> Row:
    keys = ("peak_bytes", "cache_bytes", "prefill_tps", "decode_tps", "perplexity", "kl")
    values = dict(zip(keys, numbers, strict=True))
    for key in ("peak_bytes", "cache_bytes"):
        values[key] = int(values[key] * MIB)
    ppl, kl = values["perplexity"], values["kl"]
    errors = {"perplexity_se": ppl * 0.028, "kl_se": kl * 0.06}
    return Row(name=name, group=group, needle_trials=4, **{**values, **errors, **more})


def _rows() -> list[Row]:
    attention, heads, window = "Attention", "Heads", "Sliding window"
    return [
        _row("standard attention", attention, (812, 184, 402, 19.8, 8.412, 0), same_top=1.0,
             needle=1.0),
        _row("flash attention", attention, (246, 184, 731, 24.1, 8.412, 2e-9), same_top=1.0,
             needle=1.0, options={"flash_attn": "enabled"}),
        _row("GQA, as trained (3 heads)", heads, (246, 184, 731, 24.1, 8.412, 2e-9), same_top=1.0,
             needle=1.0),
        _row("MHA, exact expansion (9)", heads, (611, 552, 655, 15.2, 8.412, 3e-9), same_top=1.0,
             needle=1.0),
        _row("MQA, mean-pooled (1)", heads, (121, 61, 802, 29.9, 4812.4, 7.93), same_top=0.021,
             needle=0.0, note="converted without training: a model has to be trained for it"),
        _row("window 1024", window, (132, 69, 842, 31.2, 61.3, 1.82), same_top=0.551, needle=0.25,
             options={"n_swa": 1024}),
        _row("window 1024 + 4 sinks", window, (132, 69, 839, 31.0, 9.127, 0.094), same_top=0.901,
             needle=0.25, options={"n_swa": 1024, "n_sinks": 4}),
        _row("sinks | window | strided", "Sparse attention", (251, 184, 960, 25.0, 8.633, 0.041),
             same_top=0.934, needle=0.75),
        _row("block top-k", "Sparse attention", (262, 184, 880, 24.4, 8.467, 0.0123),
             same_top=0.9687, needle=1.0),
        _row("token compression to 50 %", "Compression", (131, 92, 1480, 30.3, 9.8, 0.21),
             same_top=0.82, needle=0.5),
        _row("SnapKV, keeps 1024", "Compression", (255, 47, 725, 33.8, 8.71, 0.052),
             same_top=0.927, needle=1.0),
        _row("int8 cache", "Quantized cache", (142, 53, 655, 26.3, 8.413, 4e-4), same_top=0.9961,
             needle=1.0, options={"type_k": "int8", "type_v": "int8"}),
        Row(name="int4 cache", group="Quantized cache", status="failed",
            note="float16 accumulation is not supported on this CPU: use <int8> or _f32_"),
        Row(name="all: YaRN + top-k + tokens 50 % + int8", group="All together",
            status="stopped", peak_bytes=90 * MIB),
    ]  # fmt: skip


def _curves() -> list[Curve]:
    positions = list(range(0, 16384, 1024))
    inside = [14.2, 9.1, 8.0, 7.7, 7.1, 7.4, 6.6, 6.2]

    def curve(name: str, cost: float, outside: list[float], note: str = "") -> Curve:
        values = [p * cost for p in inside] + outside
        return Curve(name=name, block=1024, positions=positions[: len(values)],
                     perplexity=values, note=note)  # fmt: skip

    return [
        curve("plain", 1.0, [11.9, 15.8, 43.1, 142, 390, 611, 902, 1180]),
        curve("linear x2", 1.31, [15.1, 13.9, 14.6, 15.2, 15.0, 14.8, 15.3, 15.9]),
        curve("NTK x2", 1.05, [12.0, 10.9, 13.8, 15.9, 21.4, 37, 70, 120]),
        curve("YaRN x2", 1.015, [11.5, 10.2, 11.5, 12.2, 11.8, 12.0, 12.4, 12.9]),
        curve("dynamic", 1.0, [12.6, 12.9], "stopped"),
    ]
