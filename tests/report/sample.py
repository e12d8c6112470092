"""A made-up record shaped like a real run: every kind of row, a sweep, claims, curves."""

from __future__ import annotations

from saccade.report.comparison import Claim, Curve, Report, Row, SweepPoint

MIB = 1024**2
WEIGHTS = 512 * MIB
BROKEN = "MQA (KV heads averaged)"
TOGETHER = "all: YaRN + window 1024 + 4 sinks + int8 KV"


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
        baseline="transformers eager",
        reference="transformers sdpa",
        date="2026-01-31T12:00:00+00:00",
        rows=_rows(),
        curves=_curves(),
        sweep=_sweep(),
        claims=_claims(),
        seconds=151.2,
        complete=False,
    )


def _row(name: str, group: str, numbers: tuple, **more: object) -> Row:
    """Speeds are known to 1 %, perplexity to 2.8 % alone and 0.4 % beside the reference's."""
    keys = ("peak_bytes", "cache_bytes", "prefill_tps", "decode_tps", "perplexity", "kl")
    values = dict(zip(keys, numbers, strict=True))
    for key in ("peak_bytes", "cache_bytes"):
        values[key] = int(values[key] * MIB)
    values["total_bytes"] = values["peak_bytes"] + WEIGHTS
    ppl, kl = values["perplexity"], values["kl"]
    values |= {f"{key}_tps_se": values[f"{key}_tps"] * 0.01 for key in ("prefill", "decode")}
    values |= {"perplexity_se": ppl * 0.028, "kl_se": kl * 0.06}
    values |= {"perplexity_ratio_se": ppl / 8.412 * 0.004}
    ttft = 4096 / values["prefill_tps"]
    values |= {"ttft_seconds": ttft, "ttft_seconds_se": ttft * 0.01, "needle_trials": 24}
    return Row(name=name, group=group, **{**values, **more})


def _rows() -> list[Row]:
    attention, heads, window, together = "Attention", "Heads", "Sliding window", "Together"
    exact = {"same_top": 1.0, "needle": 1.0}
    return [
        _row("transformers eager", attention, (812, 184, 124, 6.9, 8.412, 2e-9), **exact,
             options={"attn_implementation": "eager", "n_batch": 4096}),
        _row("transformers sdpa", attention, (402, 184, 352, 8.8, 8.412, 0), **exact,
             options={"attn_implementation": "sdpa", "n_batch": 512}),
        _row("flash attention", attention, (246, 184, 373, 9.0, 8.412, 2e-9), **exact,
             options={"flash_attn": "enabled"}),
        _row("MHA (KV heads repeated)", heads, (611, 552, 310, 7.2, 8.412, 3e-9), **exact),
        _row(BROKEN, heads, (121, 61, 402, 11.9, 9080.4, 6.68), same_top=0.021, needle=0.0,
             note="converted without training: a model has to be trained for it"),
        _row("window 1024", window, (132, 69, 442, 10.2, 61.3, 0.82), same_top=0.551, needle=6 / 24,
             options={"n_swa": 1024}),
        _row("window 1024 + 4 sinks", window, (132, 69, 439, 10.0, 9.127, 0.094), same_top=0.901,
             needle=6 / 24, options={"n_swa": 1024, "n_sinks": 4}),
        _row("sinks | window | strided", "Sparse", (251, 184, 460, 8.9, 8.633, 0.041),
             same_top=0.934, needle=18 / 24),
        _row("YaRN x2", "Positions", (246, 184, 370, 8.9, 8.71, 0.0302), same_top=0.918,
             needle=1.0, options={"rope_scaling_type": "yarn", "n_ctx": 16384,
                                  "yarn_orig_ctx": 8192}),
        _row("tokens kept 50 %", "Compression", (131, 92, 300, 10.3, 9.8, 0.21), same_top=0.82,
             needle=0.5),
        Row(name="SnapKV, KV kept 25 %", group="Compression", status="not applicable",
            note="every layer already slides over 512 tokens, so there is nothing to leave out"),
        _row("int8 KV", "Quantized KV", (142, 53, 345, 9.9, 8.413, 4e-4), same_top=0.9961,
             needle=1.0, options={"type_k": "int8", "type_v": "int8"}),
        Row(name="int4 KV", group="Quantized KV", status="failed",
            note="float16 accumulation is not supported on this CPU: use <int8> or _f32_"),
        _row(TOGETHER, together, (60, 24, 401, 9.4, 9.31, 0.11), same_top=0.87, needle=6 / 24,
             parts=["YaRN x2", "window 1024 + 4 sinks", "int8 KV"],
             options={"rope_scaling_type": "yarn", "n_ctx": 16384, "yarn_orig_ctx": 8192,
                      "n_swa": 1024, "n_sinks": 4, "type_k": "int8", "type_v": "int8",
                      "flash_attn": "enabled"}),
        Row(name="YaRN + SnapKV 25 %", group=together, status="stopped", peak_bytes=90 * MIB,
            total_bytes=90 * MIB + WEIGHTS,
            note="stopped while its answers were written", parts=["YaRN x2", "int4 KV"]),
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


def _sweep() -> list[SweepPoint]:
    """Eager is quadratic and fails at the longest; a window needs the same at every length."""
    kinds = {
        "transformers eager": (7e-3, 4.0, 0.0),
        "transformers sdpa": (2.6e-3, 0.25, 0.0),
        "flash attention": (2.5e-3, 0.15, 2e-9),
        "window 1024 + 4 sinks": (2.2e-3, 0.0, 0.09),
        "YaRN x2 + int8 KV": (2.7e-3, 0.06, 0.03),
    }
    return [
        _at(name, length, *kind) for length in (1024, 4096, 16384, 65536)
        for name, kind in kinds.items()
    ]  # fmt: skip


def _at(name: str, length: int, seconds: float, growth: float, kl: float) -> SweepPoint:
    point = SweepPoint(name=name, n_context=length)
    if name == "transformers eager" and length > 16384:
        point.status, point.note = "failed", "the score matrices need 154 GiB, 24 GiB are there"
        return point
    share = length / 1024
    point.cache_bytes = int((45 * share if growth else 60) * MIB * (0.3 if "int8" in name else 1))
    point.peak_bytes = int((60 + 40 * growth * share) * MIB) + point.cache_bytes
    point.ttft_seconds = length * seconds * (1 + 0.02 * share * growth)
    point.prefill_tps = length / point.ttft_seconds
    point.decode_tps = 12 / (1 + 0.05 * share * (growth + 0.02))
    point.perplexity, point.kl, point.kl_se = 8.4 * (1 + kl), kl * share**0.3, kl * 0.05
    return point


def _claims() -> list[Claim]:
    return [
        Claim(technique="flash attention", quantity="memory saved", claimed="50 %",
              measured="70 % (eager), 39 % (sdpa)",
              reason="sdpa does not keep the scores either; what is left are activations"),
        Claim(technique="flash attention", quantity="speed", claimed="2-4x",
              measured="3.01x (eager), 1.06x (sdpa)",
              reason="on a CPU sdpa already computes tile by tile"),
        Claim(technique=BROKEN, quantity="memory saved", claimed="97 %", measured="",
              reason="the model has 3 KV heads, not 32: at most 67 % of its cache can go"),
    ]  # fmt: skip
