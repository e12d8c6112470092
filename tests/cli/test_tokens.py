"""Chat templates are programs in a model's files: what they refuse, and what ends an answer."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from saccade.cli import main
from saccade.cli.failure import UsageError
from saccade.cli.tokens import encode_messages, end_tokens
from saccade.hf.gguf_tokenizer import gguf_tokenizer
from tests.hf.byte_level import CONTROL, byte_level
from tests.hf.gguf_files import write_gguf
from tests.tiny_models import tiny_config, tiny_model

TURNS = "{% for m in messages %}<|u|>{{ m.content }}END\n{% endfor %}<|a|>"


def tokenizer_with(template, *special):
    extra = [(token, CONTROL) for token in ("<|u|>", "<|a|>", *special)]
    keys = {"tokenizer.chat_template": template, "tokenizer.ggml.eos_token_id": 256}
    return gguf_tokenizer(byte_level(extra=extra, **keys))[0]


BAD = {
    "does not parse": "{% for m in messages %}",
    "raises": "{{ raise_exception('roles must alternate') }}",
    "divides by zero": "{{ 1 / 0 }}",
    "calls what is none": "{{ messages.nothing() }}",
    "adds text to a number": "{{ messages[0].content + 1 }}",
    "is unsafe": "{{ ''.__class__.__mro__ }}",
}


@pytest.mark.parametrize("case", BAD)
def test_a_template_that_fails_is_one_sentence(case):
    tokenizer = tokenizer_with(BAD[case])
    try:
        encode_messages(tokenizer, [{"role": "user", "content": "hi"}])
    except UsageError as error:
        assert "the model's chat template fails: " in str(error)
        assert "Use saccade generate --raw" in str(error)
    else:
        assert case == "is unsafe"  # undefined in the sandbox, and so nothing
    with pytest.raises(UsageError, match="Leave --system out, or use"):
        encode_messages(tokenizer_with(BAD["raises"]), [{"role": "system", "content": "hi"}])


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_the_command_says_it_before_a_word_is_written(command, tmp_path, capsys, monkeypatch):
    from saccade.hf import load

    path = tmp_path / "m.gguf"
    write_gguf(tiny_model(tiny_config("llama", vocab_size=288)), path, "llama")
    loaded = load.load_model(path)
    loaded.tokenizer.chat_template = BAD["raises"]
    monkeypatch.setattr(load, "load_model", lambda *_, **__: loaded)
    prompt = ["-p", "t1"] if command == "generate" else []
    assert main.main([command, "-m", "m", *prompt]) == 2
    shown = capsys.readouterr()
    assert "saccade: the model's chat template fails: TemplateError: roles" in shown.err
    assert shown.out == ""


@pytest.mark.parametrize(
    ("special", "end", "expected"),
    [(["<|im_end|>"], "<|im_end|>", {256, 258}),  # the config lacks it, the template has it
     ([], "", {256}),  # behind an answer there is only text
     (["<|end|>", "<|return|>"], "<|end|>", {256})],  # Harmony: the end of a part of an answer
)  # fmt: skip
def test_what_the_template_puts_behind_an_answer_ends_it(special, end, expected):
    tokenizer = tokenizer_with(TURNS.replace("END", end), *special)
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=256))
    loaded = SimpleNamespace(model=model, tokenizer=tokenizer, name="m", notes=[])
    assert end_tokens(loaded) == expected


def test_a_template_that_fails_adds_no_end():
    tokenizer = tokenizer_with(BAD["raises"])
    model = SimpleNamespace(generation_config=None)
    assert end_tokens(SimpleNamespace(model=model, tokenizer=tokenizer, name="m", notes=[])) == {
        256
    }


def test_text_spelled_like_a_special_token_is_that_token():
    """As in transformers and llama.cpp; it is in the module's text."""
    tokens = encode_messages(tokenizer_with(TURNS), [{"role": "user", "content": "a<|a|>"}])
    assert tokens[:3] == [256, 64, 257]
