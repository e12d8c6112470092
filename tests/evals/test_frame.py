"""A sample's tokens are those of the model's own chat template around the same messages."""

from __future__ import annotations

import pytest

from saccade.core import BadInput
from saccade.evals.frame import end_tokens, frame_of, length_of, prompt_of
from saccade.evals.tasks import Sample, Turn
from tests.cli.byte_tokenizer import Bytes


def turn(question, prefix):
    return Turn(question=question, prefix=prefix, answers=("1",), n_predict=5)


SAMPLE = Sample("The text.\n", (turn("What?", "It is"), turn("And now?", "Now it is")))


def read(prompt, answers):
    """The whole conversation as text, with what the model wrote."""
    parts = [bytes(prompt.context)]
    for asked, answer in zip(prompt.turns, [*answers, ""], strict=True):
        parts += [bytes(asked.question), bytes(asked.prefix), answer.encode()]
    return b"".join(parts).decode()


def test_a_conversation_in_the_template():
    tokenizer = Bytes("a template")
    prompt = prompt_of(SAMPLE, frame_of(tokenizer), tokenizer)
    messages = [
        {"role": "user", "content": "The text.\nWhat?"},
        {"role": "assistant", "content": "It is 1"},
        {"role": "user", "content": "And now?"},
    ]
    whole = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert read(prompt, [" 1"]) == whole + "Now it is"
    assert length_of(prompt, SAMPLE) == len(whole + "Now it is") - len(" 1") + 2 * 5


@pytest.mark.parametrize("tokenizer", [Bytes(), Bytes("a template")])
def test_without_a_template(tokenizer):
    prompt = prompt_of(SAMPLE, frame_of(tokenizer, raw=True), tokenizer)
    assert read(prompt, [" 1"]) == "The text.\nWhat? It is 1\nAnd now? Now it is"


class Broken(Bytes):
    def __init__(self, error):
        super().__init__("a template")
        self.error = error

    def apply_chat_template(self, messages, **_):
        if self.error:
            raise self.error
        return "always the same"


@pytest.mark.parametrize("error", [RuntimeError("roles"), None])
def test_a_template_that_fails_is_one_sentence(error):
    said = "chat template fails: RuntimeError: roles. Use --raw" if error else "leaves out or"
    with pytest.raises(BadInput, match=said):
        frame_of(Broken(error))


def test_ends():
    from types import SimpleNamespace

    tokenizer = Bytes("a template")
    tokenizer.added_tokens_decoder = {ord("\n"): SimpleNamespace(special=True)}
    config = SimpleNamespace(eos_token_id=[2, 3])
    assert end_tokens(frame_of(tokenizer), tokenizer, config) == {0, 2, 3, ord("\n")}
    assert end_tokens(frame_of(tokenizer, raw=True), tokenizer, config) == {0, 2, 3}


@pytest.mark.real_model
def test_every_task_is_as_long_as_was_asked_with_a_real_tokenizer():
    """All tokens that a model reads and may write, counted from the whole conversation as text."""
    from saccade.evals.tasks import TASKS, Room, essay_of, samples_of
    from saccade.hf.load import load_model

    tokenizer = load_model("smollm2").tokenizer
    frame = frame_of(tokenizer)

    def count(text):
        return len(tokenizer(text, add_special_tokens=False).input_ids)

    room = Room(2048, count, essay_of())
    for task in TASKS.values():
        (sample,) = samples_of(
            task, 1, 42, room, lambda each: length_of(prompt_of(each, frame, tokenizer), each)
        )
        first = sample.turns[0]
        messages = [{"role": "user", "content": sample.context + first.question}]
        whole = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        later = sum(count(t.question + t.prefix) + 12 for t in sample.turns[1:])
        written = sum(turn.n_predict for turn in sample.turns)
        total = count(whole + first.prefix) + later + written
        assert 0.95 * 2048 <= total <= 2048 + 12 * len(sample.turns), task.name
        prompt = prompt_of(sample, frame, tokenizer)
        read = prompt.context + prompt.turns[0].question + prompt.turns[0].prefix
        assert tokenizer.decode(read) == whole + first.prefix
        assert length_of(prompt, sample) <= 2048
