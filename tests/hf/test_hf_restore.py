"""What attach and Context change on a model is undone exactly, in every order and after errors."""

from __future__ import annotations

import contextlib
import copy
import inspect
import pickle
import sys
from contextlib import ExitStack
from itertools import permutations
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

import saccade
from saccade.core import Unsupported
from saccade.hf import KEY, attach, runs
from saccade.runtime.params import ContextParams
from tests.hf.model_state import code_of_transformers, different, state_of
from tests.support.locks import is_free, takes_a_lock
from tests.tiny_models import tiny_config, tiny_model

YARN = ContextParams(n_ctx=2048, rope_scaling_type="yarn")
EVERYTHING = ContextParams(
    n_ctx=2048, rope_scaling_type="yarn", n_swa=8, n_sinks=2, fused_layers=True
)
RUNS = {
    "attach": attach,
    "attach everything": lambda model: attach(model, EVERYTHING),
    "context": lambda model: saccade.Context(model, EVERYTHING),
    "context int8": lambda model: saccade.Context(
        model, ContextParams(type_k="int8", type_v="int8")
    ),
}
FAMILIES = ["llama", "mistral", "qwen3", "gemma2", "gemma3", "gpt_oss", "phi3", "deepseek_v3"]


def small(family="llama", **changes):
    return tiny_model(tiny_config(family, **changes))


@pytest.fixture(scope="module")
def model():
    return small(num_hidden_layers=1)


@pytest.mark.parametrize("closing", list(permutations(range(3))), ids=str)
@pytest.mark.parametrize("opening", list(permutations(RUNS, 3)), ids="-".join)
def test_every_order_of_closing(model, opening, closing):
    before = state_of(model)
    stacks = [ExitStack() for _ in opening]
    for stack, name in zip(stacks, opening, strict=True):
        stack.enter_context(RUNS[name](model))
    for index in closing:
        assert model.config._attn_implementation == KEY
        stacks[index].close()
    assert different(before, state_of(model)) == []


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fails", [False, True])
def test_after_use(family, fails, ids):
    model, code = small(family), None
    runs = ["attach everything"] if family == "deepseek_v3" else list(RUNS)
    before = state_of(model)
    with torch.no_grad():
        expected = model(ids).logits
        for name in runs:
            try:
                with RUNS[name](model) as run:
                    code = code or code_of_transformers()
                    model(ids)
                    if isinstance(run, saccade.Context):
                        list(run.stream(ids[0], n_predict=3))
                    if fails:
                        raise KeyError("anything")
            except KeyError:
                assert fails
            assert different(before, state_of(model)) == []
        assert torch.equal(model(ids).logits, expected)


@pytest.mark.parametrize("name", RUNS)
def test_nothing_outside_the_model_object_changes(name, ids):
    model = small()
    with RUNS[name](model):
        model.generate(ids, max_new_tokens=2)  # transformers imports some of its modules lazily
    before = code_of_transformers()
    with RUNS[name](model) as run, torch.no_grad():
        assert different(before, code_of_transformers()) == []
        if isinstance(run, saccade.Context):
            list(run.stream(ids[0], n_predict=3))
        model.generate(ids, max_new_tokens=2)
        assert different(before, code_of_transformers()) == []
    assert different(before, code_of_transformers()) == []


class Injected(Exception):
    pass


class RaiseAt:
    """Raises at the n-th call of a function of saccade.hf, or of what it calls of transformers."""

    OWN = str(Path(saccade.hf.__file__).parent)
    THEIRS = ("set_attn_implementation", "get_correct_attn_implementation", "register", "modules")

    def __init__(self, number):
        self.left = number

    def __call__(self, frame, event, argument):
        code = frame.f_code
        if code.co_flags & inspect.CO_GENERATOR:  # also called to be closed, where none may raise
            return
        if code.co_filename.startswith(self.OWN) or code.co_name in self.THEIRS:
            self.left -= 1
            if self.left == 0:
                sys.settrace(None)
                raise Injected(code.co_qualname)


def opened(model, name, number):
    """Where the n-th call raised, None if there are fewer calls."""
    before = sys.gettrace()
    sys.settrace(RaiseAt(number))
    try:
        with ExitStack() as stack:
            stack.enter_context(RUNS[name](model))
            sys.settrace(before)
    except Injected as error:
        return str(error)
    finally:
        sys.settrace(before)
    return None


@pytest.mark.parametrize("beside", [None, "context"])
@pytest.mark.parametrize("name", ["attach everything", "context"])
def test_an_exception_in_any_function_leaves_nothing(model, name, beside):
    """Alone, and beside another run whose changes have to stay."""
    with RUNS[name](model):
        pass  # its self-check, which may catch what is raised in it, has passed from here on
    start, where = state_of(model), []
    with ExitStack() as stack:
        if beside is not None:
            stack.enter_context(RUNS[beside](model))
        before = state_of(model)
        while failed := opened(model, name, len(where) + 1):
            where.append(failed)
            assert different(before, state_of(model)) == [], failed
    assert len(where) > 30 and {"make_run", "ModelRuns.begin"} <= set(where)
    assert different(start, state_of(model)) == []


class Interrupt(BaseException):
    """As KeyboardInterrupt, which would end pytest where a test fails."""


class InterruptAt:
    """Raises, as Ctrl-C does, before the n-th line of what attaches and detaches."""

    FILES = (RaiseAt.OWN, contextlib.__file__)

    def __init__(self, number):
        self.left, self.where = number, None

    def is_freeing(self, frame):
        """Python swallows what is raised while an object is freed."""
        while frame is not None and frame.f_code.co_name != "__del__":
            frame = frame.f_back
        return frame is not None

    def __call__(self, frame, event, argument):
        code = frame.f_code
        ours = code.co_filename.startswith(self.FILES) or code.co_name in RaiseAt.THEIRS
        if not ours or self.left <= 0 or self.is_freeing(frame):
            return None
        if event == "line" and not takes_a_lock(frame):
            self.left -= 1
            if self.left == 0:
                self.where = f"{code.co_qualname}, line {frame.f_lineno}"
                sys.settrace(None)
                raise Interrupt
        return self


def attached_until(model, number):
    """Where the n-th line was, None if attaching and detaching have fewer."""
    before, interrupt = sys.gettrace(), InterruptAt(number)
    sys.settrace(interrupt)
    try:
        with attach(model, EVERYTHING):
            pass
    except Interrupt:
        pass
    finally:
        sys.settrace(before)
    return interrupt.where


@pytest.mark.parametrize("beside", [None, "context"])
def test_an_interrupt_at_any_line_leaves_nothing(model, beside):
    """Also within the code that undoes; beside another run there is less to do."""
    start, where = state_of(model), []
    with ExitStack() as stack:
        if beside is not None:
            stack.enter_context(RUNS[beside](model))
        before = state_of(model)
        number, step = 1, 29 if beside is None else 5
        while line := attached_until(model, number):
            where.append(line)
            assert different(before, state_of(model)) == [], line
            number += step
    assert len(where) > 50
    assert different(start, state_of(model)) == []


def test_an_interrupt_of_each_step_of_undoing(model):
    """The lines of `Undo.run`, `ModelRuns.end` and what they call, every one of them."""
    before = state_of(model)
    for line in range(1, 40):
        attaching = attach(model, EVERYTHING)
        attaching.__enter__()
        interrupt = InterruptAt(line)
        sys.settrace(interrupt)
        try:
            attaching.__exit__(None, None, None)
        except Interrupt:
            pass
        finally:
            sys.settrace(None)
        del attaching
        assert different(before, state_of(model)) == [], interrupt.where
        assert is_free(runs._LOCK), interrupt.where


def test_an_attach_is_entered_once(model):
    before, attaching = state_of(model), attach(model)
    with attaching, pytest.raises(Unsupported, match=r"call attach\(model, params\) again"):
        attaching.__enter__()
    with attaching:
        assert model.config._attn_implementation == KEY
    assert different(before, state_of(model)) == []


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, pickle.dumps])
@pytest.mark.parametrize("name", ["attach", "attach everything"])
def test_attached_models_are_not_copied(model, name, copied, tmp_path, ids):
    """The copy's methods would be those of the original."""
    with RUNS[name](model):
        with pytest.raises(Unsupported, match="cannot be copied or pickled while"):
            copied(model)
        model.save_pretrained(tmp_path)
    assert copied(model) is not None
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)


def test_what_others_changed_inside_stays(llama):
    """An attribute that was replaced while attached is not ours to put back."""
    with attach(llama):
        llama.generate = other = lambda *args, **kwargs: "other"
    assert vars(llama).pop("generate") is other


def test_a_part_of_an_attached_model(llama):
    """The same object again, or nothing: two owners would undo each other's changes."""
    before = state_of(llama)
    with attach(llama.model):
        with pytest.raises(Unsupported, match="a part of this LlamaForCausalLM is attached"):
            attach(llama).__enter__()
        with attach(llama.model):
            pass
    assert different(before, state_of(llama)) == []


def test_an_implementation_set_while_attached(llama):
    with attach(llama):
        llama.set_attn_implementation("sdpa")
        with pytest.raises(Unsupported, match="was set to 'sdpa' while it was attached"):
            attach(llama, YARN).__enter__()
    assert llama.config._attn_implementation == "eager"
