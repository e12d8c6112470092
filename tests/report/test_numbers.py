"""How numbers are written."""

from __future__ import annotations

import pytest

from saccade.report import numbers


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1024, "1.00 KiB"),
        (1023 * 1024, "0.999 MiB"),
        (212 * 1024**2, "212 MiB"),
        (1.25 * 1024**3, "1.25 GiB"),
        (5000 * 1024**4, "5,000 TiB"),
    ],
)
def test_bytes(count, text):
    assert numbers.as_bytes(count) == text


@pytest.mark.parametrize(
    ("ratio", "text"),
    [
        (0.35, "0.35x"),
        (1, "1.00x"),
        (12.41, "12.4x"),
        (572.3, "572x"),
        (0.004, "0.004x"),
        (0, "0x"),
    ],
)
def test_ratio(ratio, text):
    assert numbers.as_ratio(ratio) == text


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (8.412, 0.2355, "8.41 ±0.24"),
        (8.412, 0.52, "8.4 ±0.5"),
        (4812.4, 134.7, "4,812 ±135"),
        (0.01234, 0.0007, "0.0123 ±0.0007"),
        (0.01234, None, "0.0123"),
        (8.412, 0.0, "8.41"),
        (0, None, "0"),
        (0, 0.0, "0"),
        (2e-9, 1e-10, "<0.0001"),
        (0.4, 1e-7, "0.4000"),  # the error rounds to nothing: it is left out
        (float("inf"), None, "inf"),
    ],
)
def test_value_with_error(value, error, text):
    assert numbers.with_error(value, error) == text


def test_a_share_is_never_rounded_up_to_perfection():
    assert numbers.as_share(1.0) == "100 %"
    assert numbers.as_share(0.9999) == ">99.9 %"
    assert numbers.as_share(0.5514) == "55.1 %"


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("memory_bytes", 24 * 1024**3, "24.0 GiB"),
        ("run_seconds", 151, "2 min 31 s"),
        ("tokens", 112874, "112,874"),
        ("quick", True, "yes"),
        ("gpu", None, "–"),
        ("gpu", ["A", "B"], "A, B"),
        ("options", {"n_swa": 1024, "flash_attn": "enabled"}, "n_swa 1,024, flash_attn enabled"),
        ("share", 0.25, "0.250"),
    ],
)
def test_facts(name, value, text):
    assert numbers.as_fact(name, value) == text


def test_durations_and_positions():
    assert numbers.as_duration(3905) == "1 h 05 min"
    assert numbers.as_duration(59.4) == "59 s"
    assert [numbers.as_position(p) for p in (0, 500, 1024, 8192)] == ["0", "500", "1k", "8k"]
