"""The file of finished samples: nothing that was finished is lost, nothing wrong is continued."""

from __future__ import annotations

import json

import pytest

from saccade.core import BadInput
from saccade.evals.kept import Finished, KeptSamples, Place

MADE = {"model": "m", "seed": 1}


def place(number):
    return Place("dense", "", "vt", 1024, number)


def finished(score=1.0, prompt="p"):
    return Finished(prompt=prompt, answers=["a\n"], scores=[score], cache_bytes=8, seconds=0.5)


def filled(path, count=3):
    kept = KeptSamples(path, MADE)
    for number in range(count):
        kept.add(place(number), finished(number / 4))
    return kept


def test_samples_come_back(tmp_path):
    path = tmp_path / "k.jsonl"
    filled(path)
    again = KeptSamples(path, MADE)
    assert [again.get(place(n), "p") for n in range(4)] == [
        finished(0.0), finished(0.25), finished(0.5), None,
    ]  # fmt: skip
    assert KeptSamples(None, MADE).get(place(0), "p") is None


@pytest.mark.parametrize("cut", [1, 10, 60])
def test_a_line_that_was_cut_off_costs_that_sample_alone(tmp_path, cut):
    path = tmp_path / "k.jsonl"
    filled(path)
    path.write_bytes(path.read_bytes()[:-cut])
    again = KeptSamples(path, MADE)
    assert again.get(place(1), "p") is not None and again.get(place(2), "p") is None
    again.add(place(2), finished(0.75))
    assert KeptSamples(path, MADE).get(place(2), "p") == finished(0.75)
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_a_file_that_was_cut_in_its_first_line_begins_anew(tmp_path):
    path = tmp_path / "k.jsonl"
    filled(path, 0)
    path.write_bytes(path.read_bytes()[:9])
    assert filled(path).get(place(0), "p") is not None


@pytest.mark.parametrize(
    "content", [b"a book", b"a book\n", b"{}\n", b"[1]\n", b'{"schema": "saccade.compare/2"}\n']
)
def test_other_files_are_left_alone(tmp_path, content):
    path = tmp_path / "k.jsonl"
    path.write_bytes(content)
    with pytest.raises(BadInput, match="is no file of samples, which --keep .* Name another file"):
        KeptSamples(path, MADE)
    assert path.read_bytes() == content


def test_a_line_that_is_no_sample(tmp_path):
    path = tmp_path / "k.jsonl"
    filled(path)
    path.write_text(path.read_text() + '{"row": 1}\n')
    with pytest.raises(BadInput, match="is no file of samples"):
        KeptSamples(path, MADE)


def test_another_model_seed_or_text_is_refused(tmp_path):
    path = tmp_path / "k.jsonl"
    filled(path)
    with pytest.raises(BadInput, match=r"made with another seed \(1, now 2\)"):
        KeptSamples(path, MADE | {"seed": 2})
    with pytest.raises(BadInput, match="another text for sample 1 of vt at 1,024 tokens"):
        KeptSamples(path, MADE).get(place(1), "q")
