"""Random command lines: each ends with an exit code and a sentence, never with a traceback.

`SACCADE_FUZZ=3000` tries that many; every line is printed by the failure that it causes.
"""

from __future__ import annotations

import io
import os
import random
import sys

import pytest

from saccade.cli import main as main_module
from saccade.cli.shared_options import CONTEXT, SAMPLING
from tests.hf.gguf_files import write_gguf
from tests.tiny_models import tiny_config, tiny_model

RUNS = int(os.environ.get("SACCADE_FUZZ", "100"))
BATCH = 50

NUMBERS = [
    "0", "1", "2", "7", "64", "-1", "-0", "+3", "1.5", "0.5", "1e3", "1e-3", "1e308", "-1e308",
    "5e-324", "inf", "-inf", "nan", "1_000", "0x10", "٣", "9" * 19, "9" * 400, "9" * 5000,
    "50%",
    "nan%", "inf%", "-5%", "1e400", "", " ", "4GiB", "4", "1e9GiB", "-4GiB", "0GiB",
]  # fmt: skip
WORDS = [
    "on", "off", "auto", "none", "linear", "yarn", "ntk", "dynamic", "int8", "int4", "fp8", "f16",
    "bf16", "f32", "snapkv", "ada_snapkv", "strided", "quest", "enabled", "disabled", "tiled",
    "reference", "sdpa", "cpu", "triton", "gluon", "ON", "İ", "🙂", "a\x00b", "\udcff", "a,b", ",",
]  # fmt: skip
FLAGS = (
    "--prompt -p -f --session -n --raw --memory --context --text --json --html --png --markdown "
    "--rows --system --help --threads --cases --nonsense --version"
).split()
TEXTS = [
    "hi",
    "t1 t2 t3",
    "",
    " ",
    "\n",
    "a\x00b",
    "\udcff\udcfe",
    "🙂" * 50,
    "</s><s>",
    "x" * 3000,
]
COMMANDS = [
    "generate", "generate", "generate", "chat", "compress",
    "plan", "compare", "doctor", "bench", "x",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Files of every kind, and a model that works."""
    root = tmp_path_factory.mktemp("fuzz")
    write_gguf(tiny_model(tiny_config("llama", vocab_size=288)), root / "model.gguf", "llama")
    whole, rng = (root / "model.gguf").read_bytes(), random.Random(5)
    (root / "cut.gguf").write_bytes(whole[: len(whole) // 2])
    for index in range(4):
        spoiled = bytearray(whole)
        for _ in range(20):
            spoiled[rng.randrange(len(whole) if index else 4000)] = rng.randrange(256)
        (root / f"spoiled{index}.gguf").write_bytes(spoiled)
    (root / "random.gguf").write_bytes(b"GGUF" + rng.randbytes(500))
    (root / "random").write_bytes(rng.randbytes(500))
    (root / "text.txt").write_text("t1 t2 t3\n" * 5)
    (root / "empty.txt").write_bytes(b"")
    (root / "latin.txt").write_bytes(b"caf\xe9")
    (root / "hollow").mkdir()
    (root / "broken").mkdir()
    (root / "broken/config.json").write_bytes(rng.randbytes(50))
    (root / "odd").mkdir()
    (root / "odd/config.json").write_text('{"model_type": "llama", "hidden_size": -3}')
    return root


def a_file(rng, folder):
    names = [path.name for path in folder.iterdir()] + [
        "missing", "missing/deep", "a\x00b", "-", "", "~nobody-of-this-name/x", "~", "x" * 300,
        "/dev/null", "/", "\udcff", "new.session", "out.json"]  # fmt: skip
    name = rng.choice(names)
    return name if name[:1] in ("/", "~", "-", "") else str(folder / name)


def an_option(rng, folder, wild):
    """One random option, mostly with a value; wild ones are seldom right."""
    option = rng.choice([*CONTEXT, *SAMPLING])
    if rng.random() < 0.75:
        flag = rng.choice(option.flags)
        sane = rng.choice([*option.choices, "8", "16", "0.5"])
        value = rng.choice([sane, rng.choice(NUMBERS), rng.choice(WORDS)]) if wild else sane
    else:
        flag = rng.choice(FLAGS)
        value = rng.choice([a_file(rng, folder), rng.choice(TEXTS), rng.choice(NUMBERS)])
    return [flag] if rng.random() < 0.05 else [flag, value]


def a_line(rng, folder):
    command = rng.choice(COMMANDS)
    line, wild = [command], rng.random() < 0.6
    if command == "bench":
        line += [rng.choice(["cpu", "tune", "x"]), "--list"]
    if command == "compress":
        line += [a_file(rng, folder), "--to", rng.choice(["8", "1k", rng.choice(NUMBERS)])]
    if command in ("generate", "chat", "compress", "plan"):
        model = str(folder / "model.gguf") if rng.random() < 0.8 else a_file(rng, folder)
        line += ["-m", model]
    if command == "generate":
        line += rng.choice([["-p", rng.choice(TEXTS)], ["-f", a_file(rng, folder)], []])
        line += ["-n", "3"]
    if command == "chat":
        line += ["-n", "3"]
    if command == "compare":  # never one that would run
        line += ["-m", str(folder / "missing")]
    for _ in range(rng.choice([0, 1, 1, 2, 2, 3, 5])):
        line += an_option(rng, folder, wild)
    if command == "compare":
        line += ["-m", str(folder / "missing")]
    return line


def stdin(rng):
    data = rng.choice(
        [b"", b"hi\n", b"/memory\n/reset\nhi\n/no\n", b"\xff\xfe\n", b"a\x00b\n", None]
    )
    return None if data is None else io.TextIOWrapper(io.BytesIO(data), encoding="utf-8")


def run(line, given, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", given)
    try:
        code = main_module.main(line)
    except BaseException as error:
        raise AssertionError(f"{line}\nends in {type(error).__name__}: {error}") from error
    finally:
        if sys.stdin is not None:
            sys.stdin.close()
    return code, capsys.readouterr()


@pytest.mark.parametrize("batch", range(-(-RUNS // BATCH)))
def test_any_command_line_ends_in_a_sentence(batch, folder, capsys, monkeypatch):
    from saccade.hf import load

    real, loaded = load.load_model, {}

    def remembered(source, **options):
        if str(source) not in loaded:
            loaded[str(source)] = real(source, **options)
        return loaded[str(source)]

    monkeypatch.setattr(load, "load_model", remembered)
    monkeypatch.chdir(folder)
    rng = random.Random(batch)
    for _ in range(min(BATCH, RUNS)):
        line = a_line(rng, folder)
        code, shown = run(line, stdin(rng), capsys, monkeypatch)
        assert code in (0, 2) and "Traceback" not in shown.err, (line, shown.err[-2000:])
        if code == 2 and line[0] != "doctor":
            said = [s for s in shown.err.splitlines() if s.startswith("saccade")]
            assert said, (line, shown.err[-2000:])
            assert len(said[-1]) < 1500 and "--traceback" not in said[-1], (line, said[-1])
