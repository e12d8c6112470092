"""`--weights` and `--dtype` reach load_model, whose refusals speak of options."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch

from saccade.cli import loading, main, shared_options
from saccade.cli.failure import UsageError
from saccade.core import BadInput
from saccade.runtime.placement import WEIGHTS, form_and_dtype


@pytest.mark.parametrize("command", ["generate", "chat", "check", "compare", "plan"])
def test_every_command_that_loads_a_model_takes_weights(command, capsys):
    code = main.main([command, "-m", "smollm2", "--weights", "int3"])
    said = capsys.readouterr().err
    assert code == 2 and said.count("\n") == 1
    assert "--weights: expected one of file, int8, int4, bf16, f32, got 'int3'." in said


def test_options_reach_load_model(stand_in):
    given = {}

    def load_model(name, **options):
        given.update(options, name=name)
        return SimpleNamespace(notes=[])

    stand_in("saccade.hf.load", load_model=load_model)
    loading.load("m", "cpu", "bf16", "int4")
    assert given == {"name": "m", "device": "cpu", "dtype": torch.bfloat16, "weights": "int4"}


def test_refusals_are_in_the_words_of_the_options(stand_in):
    def load_model(*_, **__):
        try:
            form_and_dtype("f32", torch.bfloat16, torch.device("cpu"), is_folder=True)
        except ValueError as error:
            raise BadInput(str(error)) from error

    stand_in("saccade.hf.load", load_model=load_model)
    with pytest.raises(UsageError, match=re.escape("--weights f32 goes with")) as refused:
        loading.load("m", dtype="bf16", weights="f32")
    assert "goes with --dtype f32, got --dtype bf16: leave --dtype out" in str(refused.value)


def test_a_device_that_is_none_is_refused_in_the_words_of_the_options():
    with pytest.raises(UsageError, match=r"or cuda:N as --device, got 'tpu'"):
        loading.load("smollm2", device="tpu")


def test_the_option_offers_what_loading_takes():
    assert shared_options.WEIGHTS == WEIGHTS


def test_what_loading_refuses_plans_refuse(capsys):
    words = ["plan", "-m", "smollm2", "--device", "cpu", "--weights", "f32", "--dtype", "bf16"]
    code, said = main.main(words), capsys.readouterr().err
    assert code == 2 and said.count("\n") == 1 and "--weights f32 goes with" in said
    assert "torch" not in said and "f64" not in said and "=" not in said
