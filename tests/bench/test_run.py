"""A whole run on tiny cases, with right, wrong, refused and broken kernels, and both doors."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from saccade.bench import cases, ceilings, cpu, peers, timing
from saccade.bench.cases import Bar, Case
from saccade.bench.inputs import make
from saccade.bench.record import read
from saccade.cli import main as cli
from saccade.core import Mask
from saccade.ops.attention import tiled

TINY = Case(
    group="prefill 2/1 D16 N64", work="prefill", heads=2, kv_heads=1, head_dim=16, q_len=64,
    kv_len=64, storage="fp32", quick=True, peers=("torch", "flex"),
    bars=(Bar(measure="peak", limit=1e-9), Bar(measure="torch", limit=1e9)),
)  # fmt: skip
BF16 = replace(TINY, storage="bf16", bars=(Bar(measure="time", limit=1e9, against=TINY.name),))
DECODE = replace(
    TINY, group="decode tiny", work="decode", q_len=1, kv_len=200, storage="int8", q_type="bf16",
    peers=(), bars=(),
)  # fmt: skip
BACKWARD = replace(TINY, group="backward tiny", work="backward", peers=("torch",))
TABLE = (TINY, BF16, DECODE, BACKWARD)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """A table and ceilings that take no time."""

    def sample(self):
        self.peak_samples.append(1e12)
        self.bandwidth_samples.append(1e11)

    monkeypatch.setattr(cases, "CASES", TABLE)
    monkeypatch.setattr(cpu, "BUDGET", 0.0)
    monkeypatch.setattr(cpu, "QUICK_BUDGET", 0.0)
    monkeypatch.setattr(timing, "PAUSE", 0)
    monkeypatch.setattr("saccade.bench.inputs.COLD_BYTES", 1)
    monkeypatch.setattr(ceilings.Ceilings, "sample", sample)


def last_line(capsys):
    out = capsys.readouterr().out
    assert out.endswith("\n")
    return json.loads(out.splitlines()[-1]), out


def plant(monkeypatch, kernel):
    monkeypatch.setattr(tiled, "run", kernel)


def test_every_kind_of_work_is_measured():
    seen = []
    record = cpu.run(TABLE, on_progress=lambda *state: seen.append(state))
    assert [row.status for row in record.rows] == ["ok"] * 7
    assert all(row.seconds and row.error is not None and row.error < 1 for row in record.rows)
    assert [row.backend for row in record.rows if not row.ours] == ["torch"] * 3
    first = record.find(TINY.name, record.rows[0].backend)
    assert [bar.met for bar in first.bars] == [True, False]
    assert seen == [(0, 3, TINY.group), (1, 3, "decode tiny"), (2, 3, "backward tiny")]
    assert record.complete and len(record.ceilings.peak_samples) == 4


def test_a_wrong_kernel_is_never_timed(monkeypatch, capsys):
    right = tiled.run
    calls = []

    def kernel(call):
        calls.append(call)
        return right(call.with_(mask=Mask(causal=True, window=63)))

    plant(monkeypatch, kernel)
    code = cli.main(["bench", "cpu", "--cases", TINY.name, "--backends", "tiled"])
    data, out = last_line(capsys)
    assert code == 1 and len(calls) == 1  # once through the gate
    row = next(row for row in data["rows"] if row["backend"] == "tiled")
    assert row["status"] == "WRONG" and row["seconds"] is None
    assert all(bar["met"] is None for bar in row["bars"])
    assert "WRONG" in out


def test_a_kernel_that_breaks_down(monkeypatch, capsys):
    def kernel(call):
        raise RuntimeError("it broke\nin two lines")

    plant(monkeypatch, kernel)
    assert cli.main(["bench", "cpu", "--cases", TINY.name, "--backends", "tiled,reference"]) == 1
    data, _ = last_line(capsys)
    states = {row["backend"]: (row["status"], row["note"]) for row in data["rows"]}
    assert states["tiled"] == ("failed", "RuntimeError: it broke")
    assert states["reference"][0] == "ok"


def test_a_kernel_that_refuses(monkeypatch, capsys):
    monkeypatch.setattr(tiled, "refusal", lambda call: "not on a Sunday")
    assert cli.main(["bench", "cpu", "--cases", TINY.name, "--backends", "tiled"]) == 0
    data, _ = last_line(capsys)
    assert data["rows"][0]["status"] == "cannot" and "Sunday" in data["rows"][0]["note"]


def test_stopping_keeps_what_is_finished(monkeypatch, capsys):
    def interrupted(done, total, label):
        if done == 1:
            raise KeyboardInterrupt

    record = cpu.run(TABLE, on_progress=interrupted)
    assert not record.complete and {row.group for row in record.rows} == {TINY.group}
    assert record.rows[0].bars


def test_files_and_the_stored_record(tmp_path, capsys):
    path, picture = tmp_path / "r.json", tmp_path / "r.png"
    assert cli.main(["bench", "cpu", "--quick", "--json", str(path), "--threads", "1"]) == 0
    data, out = last_line(capsys)
    assert data == json.loads(path.read_text()) and data["ceilings"]["threads"] == 1
    assert out.index("bars met") < out.index('{"revision"')
    assert read(path).quick
    drawn = ["--roofline", str(picture), "--markdown", str(tmp_path / "r.md")]
    assert cli.main(["bench", "cpu", "--record", str(path), *drawn]) == 0
    assert "| **decode tiny** |" in (tmp_path / "r.md").read_text()
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert last_line(capsys)[0] == data


def test_threads_are_given_back(capsys):
    before = torch.get_num_threads()
    cli.main(["bench", "cpu", "--cases", "decode", "--threads", "1"])
    assert torch.get_num_threads() == before


def test_cases_files_and_listing(capsys):
    assert cli.main(["bench", "cpu", "--cases", "decode"]) == 0
    assert last_line(capsys)[0]["rows"][0]["group"] == "decode tiny"
    assert cli.main(["bench", "cpu", "--list"]) == 0
    assert TINY.name in capsys.readouterr().out
    assert cli.main(["bench", "cpu", "--json", "no/such/folder/x.json"]) == 2
    assert "there is no folder no/such/folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--cases", "zzz"], "no case has 'zzz' in its name"),
        (["--backends", "zzz"], "unknown backend 'zzz'"),
        (
            ["--record", "no-such-file"],
            "no-such-file cannot be read: No such file or directory. Expected a saccade",
        ),
    ],
)
def test_mistakes_are_told_in_a_sentence(words, said, capsys):
    assert cli.main(["bench", "cpu", *words]) == 2
    captured = capsys.readouterr()
    assert said in captured.err and not captured.out


@pytest.mark.parametrize("mask", [Mask(), Mask(window=300), Mask(window=64)])
@pytest.mark.parametrize(("q_len", "kv_len"), [(512, 512), (200, 500), (1, 300)])
def test_the_block_mask_for_flex(mask, q_len, kv_len):
    flex = peers.block_mask(mask, q_len, kv_len)
    q_pos = torch.arange(kv_len - q_len, kv_len)[:, None]
    visible = mask.allows(q_pos, torch.arange(kv_len)[None])
    size = peers.BLOCK
    padded = torch.zeros(-(-q_len // size) * size, -(-kv_len // size) * size, dtype=torch.bool)
    padded[:q_len, :kv_len] = visible
    blocks = padded.unflatten(1, (-1, size)).unflatten(0, (-1, size)).transpose(1, 2)
    assert torch.equal(flex.to_dense()[0, 0].bool(), blocks.any(-1).any(-1))
    modded = flex.mask_mod(0, 0, torch.arange(q_len)[:, None], torch.arange(kv_len)[None])
    assert torch.equal(modded, visible)


def test_stand_in_ceilings_are_labelled(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(ceilings, "extension", lambda: None)
    monkeypatch.setattr(ceilings, "_measurements", lambda threads: (lambda: 2.0, lambda: 1.0))
    found = ceilings.measure(2)
    assert "stand-in" in found.source and (found.fma_peak, found.read_bandwidth) == (2, 1)


def test_the_extension_measures_where_it_is(monkeypatch):
    monkeypatch.undo()

    class Extension:
        @staticmethod
        def targets():
            return ["best", "worst"]

        @staticmethod
        def fma_peak(threads, target):
            return 10.0 * threads if target == "" else 1.0

        @staticmethod
        def read_bandwidth(threads, target):
            return 3.0

        @staticmethod
        def pair_peak(threads, target):
            return 20.0 * threads if target == "" else 0.0

    monkeypatch.setattr(ceilings, "extension", lambda: Extension)
    found = ceilings.measure(2)
    assert (found.source, found.target, found.fma_peak) == ("extension", "best", 20)
    assert found.pair_peak == 40
    monkeypatch.setenv("SACCADE_CPU_TARGET", "worst")
    found = ceilings.measure(2)
    assert (found.target, found.fma_peak, found.pair_peak) == (
        "worst",
        1,
        0,
    )  # the ceiling matches the kernels


def test_decoding_uses_the_views_in_turn(monkeypatch):
    monkeypatch.setattr("saccade.bench.inputs.COLD_BYTES", 3 * DECODE.kv_bytes)
    inputs = make(DECODE)
    seen = []
    right = tiled.run

    def kernel(call):
        seen.append(call.kv.recent_k.data_ptr())
        return right(call)

    plant(monkeypatch, kernel)
    _, construct = cpu._ours(DECODE, inputs, "tiled")
    call = construct()
    for _ in range(4):
        call()
    assert len(set(seen[:3])) == 3 and seen[3] == seen[0]
