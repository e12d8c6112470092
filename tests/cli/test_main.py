"""One sentence, the right exit code, no traceback."""

from __future__ import annotations

import subprocess
import sys

import pytest

from saccade.cli import failure, main
from saccade.cli.failure import UsageError
from saccade.core import BadInput, Unsupported

COMMANDS = [
    "compare", "generate", "chat", "compress", "plan", "bench", "bench cpu", "bench tune", "doctor"
]  # fmt: skip


def call(capsys, *words):
    code = main.main(list(words))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


BAD_LINES = [
    (["compre"], "No such command 'compre'. Did you mean 'compare', 'compress'?"),
    (
        ["zzz"],
        "No such command 'zzz'. There are compare, generate, chat, compress, plan, convert, check, "
        "doctor, eval, bench, report.",
    ),
    (["--verbose"], "saccade has no option --verbose. Did you mean --version?"),
    (["compare", "--contxt", "5"], "no option --contxt. Did you mean --context?"),
    (["compare", "--cont=5"], "no option --cont. Did you mean --context?"),  # no abbreviations
    (["compare", "--zzz"], "no option --zzz. Run saccade compare --help"),
    (
        ["compare", "extra"],
        "unexpected extra argument(s) (extra). Run saccade compare --help",
    ),
    (["compare", "--context", "0"], "number of tokens such as 4096 or 4k, got '0'"),
    (["compare", "--context", "-5"], "number of tokens such as 4096 or 4k, got '-5'"),
    (["compare", "--sweep", "4q"], "number of tokens such as 4096 or 4k, got '4q'"),
    (["compare", "--context"], "saccade: Option '--context' requires an argument."),
    (["compare", "--rows", " , "], "--rows: expected at least one"),
    (["compare", "--text", "no/such/file"], "no/such/file"),
    (["compare", "--json", "no/such/folder/x.json"], "there is no folder no/such/folder"),
    (["compare", "--html", "."], "--html . is a folder"),
    (["compare", "--html", "-"], "--html needs the name of a file"),
    (["compare", "--png", "x", "--html", "x"], "name the same file x"),
    (["generate", "--prompt", "hi"], "saccade generate: --model/-m: this option is required."),
    (["generate", "--model", "m"], "--prompt"),
    (["generate", "--modle", "m"], "Did you mean --model?"),
    (["plan"], "saccade plan: --model/-m: this option is required."),
    (["plan", "--model", "m", "--memory", "8 giraffes"], "--memory: expected a size such as 8GiB"),
    (["plan", "--model", "m", "--context", "0"], "number of tokens such as 4096 or 4k"),
    (["plan", "--model", "m", "--type-k", "int8"], "--cache-type-k int8 with no --cache-type-v"),
    (["chat", "--model", "m", "--sinks", "4"], "set --swa"),
    (["generate", "--model", "m", "--prompt", ""], "the prompt is empty"),
    (["generate", "--model", "m", "--prompt", " \n"], "the prompt is empty"),
    (["generate", "--model", "m", "--prompt-file", "no/file"], "No such file"),
    (["generate", "--model", "m", "--prompt", "a", "--prompt-file", "b"], "Give one"),
    (["generate", "--model", "m", "--prompt", "a", "--swa", "0"], "at least 1, got '0'"),
    (["generate", "--model", "m", "--prompt", "a", "--sinks", "4"], "set --swa"),
    (
        ["generate", "--model", "m", "--prompt", "a", "-ctk", "q8_0"],
        "int8, int4, fp8, got 'q8_0'.",
    ),
    (
        ["generate", "--model", "m", "--prompt", "a", "-ctk", "int8"],
        "--cache-type-k int8 with no --cache-type-v",
    ),
    (
        ["generate", "--model", "m", "--prompt", "a", "--flash-attn", "yes"],
        "expected one of auto",
    ),
    (["generate", "--model", "m", "--prompt", "a", "--kv-budget", "x"], "tokens (512), a share"),
    (["generate", "--model", "m", "--prompt", "a", "--kv-budget", "2XB"], "(512MiB), got '2XB'"),
    (["generate", "--model", "m", "--prompt", "a", "--kv-budget", "8"], "--kv-policy and --kv-bud"),
    (["generate", "--model", "m", "--prompt", "a", "--rope-scale", "0.5"], "at least 1, got 0.5"),
    (["generate", "--model", "m", "--prompt", "a", "--rope-freq-base", "nan"], "expected a number"),
    (["generate", "--model", "m", "--prompt", "a", "--top-p", "2"], "--top-p has to be a share"),
    (["generate", "--model", "m", "--prompt", "a", "--top-k", "9"], "--top-k: nothing is sampled"),
    (["generate", "--model", "m/no", "--prompt", "a"], "no model at 'm/no': expected a .gguf file"),
    (
        ["chat", "-m", "m", "--rope-scaling", "none", "--rope-scale", "2"],
        "--rope-scale 2 stretches positions, and --rope-scaling none",
    ),
    (["generate", "--model", "m", "--prompt", "a", "--temperature", "-1"], "temperature"),
    (["doctor", "--jsno"], "Did you mean --json?"),
]


@pytest.mark.parametrize(
    ("words", "said"), BAD_LINES, ids=lambda x: " ".join(x) if isinstance(x, list) else ""
)
def test_bad_command_lines(capsys, fake, words, said):
    code, out, err = call(capsys, *words)
    assert code == 2 and out == ""
    assert said in err and "Traceback" not in err
    assert len(err.strip().splitlines()) == 1 and err.startswith("saccade")
    assert not fake.calls  # nothing long was begun


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (UsageError("words"), "words"),
        (MemoryError(), "not enough memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "--ctx-size"),
        (FileNotFoundError(2, "No such file or directory", "a.gguf"), "a.gguf: No such file"),
        (ModuleNotFoundError("No module named 'rich'", name="rich"), 'pip install ".[hf,report]"'),
        (ModuleNotFoundError("No module named 'torch'", name="torch"), "PyTorch is not installed"),
        (BadInput("one\n  sentence"), "one sentence"),
        (TypeError("from the depths"), "--traceback"),
    ],
)
def test_errors_of_a_command(capsys, fake, error, said):
    fake.error = error
    code, _, err = call(capsys, "compare")
    assert code == 2 and said in err and "Traceback" not in err


def test_our_own_sentences_come_without_advice_to_debug():
    from saccade.core import Mask

    with pytest.raises(ValueError) as caught:
        Mask(window=0)
    said = failure.sentence(caught.value)
    assert said.startswith("window must be at least 1") and "--traceback" not in said


@pytest.mark.parametrize("error", [RuntimeError("bug"), KeyError("bug"), ImportError("bug")])
def test_a_bug_is_one_sentence_and_keeps_its_traceback(fake, error, capsys):
    fake.error = error
    assert main.main(["compare"]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"saccade: this is a bug of saccade ({type(error).__name__}: ")
    with pytest.raises(type(error)):
        main.main(["compare", "--traceback"])


@pytest.mark.parametrize(
    "cause",
    [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
     OSError(12, "Cannot allocate memory"), RuntimeError("CUDA out of memory. Tried"),
     RuntimeError("std::bad_alloc")],
)  # fmt: skip
def test_too_little_memory_is_said_however_it_was_wrapped(cause):
    """A loader that reads MemoryError as a damaged file must not send people to download again."""
    assert failure.sentence(cause).startswith("not enough memory")
    try:
        try:
            raise cause
        except Exception as error:
            raise UsageError("the file is truncated") from error
    except UsageError as wrapped:
        assert failure.sentence(wrapped).startswith("not enough memory")
    assert failure.sentence(UsageError("a prompt about std::bad_alloc")) == (
        "a prompt about std::bad_alloc"
    )


@pytest.mark.parametrize("command", [["generate", "-f", "-", "-m", "x"], ["chat", "-m", "x"]])
def test_streams_that_a_shell_closed(command, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    assert main.main(command) == 2
    sys.stdin.close()
    assert "is empty" in capsys.readouterr().err or command[0] == "chat"


def test_a_process_without_any_stream():
    words = ["generate", "-m", "x", "-f", "-"]
    script = f"import sys; from saccade.cli.main import main; sys.exit(main({words}))"
    closed = f'exec 0<&- 1>&- 2>&-; exec {sys.executable} -c "{script}"'
    assert subprocess.run(["sh", "-c", closed], check=False).returncode == 2


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, "1e999", '{"schema": "x"}', "\xff"])
def test_a_record_that_is_none_is_one_sentence(text, tmp_path, capsys):
    (tmp_path / "r.json").write_text(text, encoding="latin-1")
    assert main.main(["bench", "cpu", "--record", str(tmp_path / "r.json")]) == 2
    assert "r.json is no" in (err := capsys.readouterr().err) and err.count("\n") == 1


NAMES = ["--model", "--session", "--prompt-file"]


@pytest.mark.parametrize("option", NAMES)
@pytest.mark.parametrize(
    ("name", "said"),
    [("a\0b", "expected the name of a file, got 'a\\x00b'"), ("", "expected the name of a file"),
     ("~nobody-here/x", "there is no user ~nobody-here here"), ("\udcff", "expected UTF-8 text")],
)  # fmt: skip
def test_names_that_no_file_has(option, name, said, capsys):
    line = ["generate", "--model", "m", "--prompt", "hi", option, name]
    assert main.main(line) == 2
    assert f"{option}/" in (err := capsys.readouterr().err) or f"{option}:" in err
    assert said in err and err.count("\n") == 1


@pytest.mark.parametrize("value", ["9" * 400, "9" * 5000, "-1", "0", "inf", "1e3", "x" * 500])
def test_numbers_beyond_all_use_are_one_short_sentence(value, capsys):
    for option in ("--ctx-size", "--swa", "--n-predict", "--batch-size"):
        assert main.main(["generate", "-m", "m", "-p", "hi", option, value]) == 2
        err = capsys.readouterr().err
        assert "expected a whole number of at least 1" in err and len(err) < 250
    for option in ("--memory",):
        assert main.main(["plan", "-m", "m", option, value]) == 2
        assert len(err := capsys.readouterr().err) < 250 and "expected a size" in err


def test_traceback_can_be_asked_for(fake):
    fake.error = Unsupported("no")
    with pytest.raises(Unsupported):
        main.main(["compare", "--traceback"])


def test_ctrl_c_before_anything_is_finished(capsys, fake):
    fake.error = KeyboardInterrupt()
    code, _, err = call(capsys, "compare")
    assert code == 130 and err.strip().endswith("Stopped.") and "Traceback" not in err


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"]])
def test_help_lists_the_commands(capsys, words):
    code, out, _ = call(capsys, *words)
    assert code == 0 and all(f"\n  {name} " in out for name in COMMANDS if " " not in name)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_has_examples(capsys, command):
    code, out, _ = call(capsys, *command.split(), "--help")
    assert code == 0 and f"saccade {command}" in out
    assert command == "bench" or "examples:" in out
    assert call(capsys, *command.split(), "-h")[1] == out
    assert max(map(len, out.splitlines())) <= 80


def test_several_words_of_an_option():
    words = ["bench", "tune", "--kernels", "forward", "decode", "--quick", "--dims", "64", "128"]
    for spelling in (
        words,
        ["bench", "tune", "--kernels=forward,decode", "--quick", "--dims", "64,128"],
    ):
        values = main.parse(spelling).params
        assert values["kernels"] == ["forward", "decode"] and values["dims"] == [64, 128]
        assert values["quick"]


def test_version(capsys):
    import saccade

    assert call(capsys, "--version")[1] == f"saccade {saccade.__version__}\n"


def _python(code):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )


def test_help_and_typos_are_answered_without_torch():
    code = (
        "import sys; from saccade.cli.main import main;"
        "main([]); main(['compre']); main(['generate', '--modle']); main(['bench', 'tune', '-h']);"
        "print({'torch', 'transformers'} & set(sys.modules), file=sys.stderr)"
    )
    done = _python(code)
    assert done.returncode == 0 and done.stderr.strip().endswith("set()")


def test_the_reader_of_the_output_is_gone():
    """The reading end of the pipe is closed before the first word."""
    code = (
        "import os, sys; r, w = os.pipe(); os.close(r); os.dup2(w, 1);"
        "from saccade.cli.main import main; sys.exit(main([]))"
    )
    done = _python(code)
    assert done.returncode == 141 and done.stderr == ""
