"""`auto` on a CPU: measured rules of the processor's family, the user's first, and what says so."""

import json
import warnings

import pytest
import torch

from saccade.core import DenseKV, Mask
from saccade.core.hardware import processor_family
from saccade.ops import attention, explain
from saccade.ops.attention import dispatch, rules
from saccade.ops.attention.api import make_call
from saccade.ops.attention.cpu import backend as cpu
from saccade.ops.attention.cpu.binding import BUILT
from saccade.ops.attention.sdpa import backend as sdpa
from saccade.ops.tuning import rules as tuning
from saccade.ops.tuning.rules import Facts, Rule, RuleFile
from tests.support.tolerance import assert_as_exact

pytestmark = pytest.mark.skipif(not BUILT, reason="needs the C++ kernels")
WINS = {"why": "twice the speed", "source": "measured 2026-01-01"}
SDPA_FIRST = Rule(order=("sdpa", "cpu"), extras=("none",), queries=(17, tuning.LARGEST), **WINS)


@pytest.fixture(autouse=True)
def reread(monkeypatch, tmp_path):
    """No rules but those of a test: neither the package's nor those of whoever runs it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tuning, "FOLDER", tmp_path / "none")
    tuning.clear_cache()
    yield
    monkeypatch.undo()
    tuning.clear_cache()


def written(*found, family=None, path=None):
    """A file of rules, the user's own by default."""
    path = path or tuning.user_path(processor_family())
    path.parent.mkdir(parents=True, exist_ok=True)
    file = RuleFile(rules=found, architecture=family or processor_family(), measured={}, trials=[])
    path.write_text(tuning.to_json(file))
    tuning.clear_cache()
    return path


def qkv(length=64, dtype=torch.float32, **options):
    return [torch.randn(1, h, length, 32, dtype=dtype, **options) for h in (4, 2, 2)]


def chosen(*tensors, **options):
    """(backend, verdict) that `explain` says `auto` takes."""
    return next(pair for pair in explain(*tensors, **options) if pair[1].startswith("chosen"))


def test_without_rules_the_usual_order_counts():
    assert chosen(*qkv()) == ("cpu", "chosen")
    assert tuning.rules(processor_family()) is tuning.NO_RULES


def test_the_users_rule_decides_and_explain_says_which_one():
    path = written(Rule(order=("cpu",), dtype=("float16",), **WINS), SDPA_FIRST)
    name, said = chosen(*qkv())
    assert (name, said) == (
        "sdpa", f"chosen: twice the speed (measured 2026-01-01, rule 2 of {path})",
    )  # fmt: skip
    assert dict(explain(*qkv()))["cpu"] == "supported, slower here"
    assert chosen(*qkv(dtype=torch.float16))[0] == "cpu"
    q, k, v = qkv()
    call = make_call(q, DenseKV(k, v), mask=Mask())
    assert dispatch.choose(call, "auto") is sdpa


@pytest.mark.parametrize(
    "options",
    [{"softcap": 5.0}, {"window": 9}, {"key_padding": torch.ones(1, 64, dtype=torch.bool)},
     {"sink_logits": torch.zeros(4)}],
    ids=lambda options: next(iter(options)),
)  # fmt: skip
def test_a_rule_holds_only_for_what_was_measured(options):
    written(Rule(**_parts(SDPA_FIRST) | {"pattern": ("causal",)}))
    assert chosen(*qkv(), **options)[0] == "cpu"


def _parts(rule):
    return {part: getattr(rule, part) for part in ("order", "why", "source", "extras", "queries")}


def test_rules_of_the_user_come_before_those_of_the_package(monkeypatch, tmp_path):
    monkeypatch.setattr(tuning, "FOLDER", tmp_path / "package")
    written(
        Rule(order=("cpu",), why="older", source="record"),
        path=tuning.FOLDER / f"{processor_family()}.json",
    )
    assert chosen(*qkv()) == (
        "cpu", f"chosen: older (record, rule 1 of {processor_family()}.json)",
    )  # fmt: skip
    written(SDPA_FIRST)
    assert chosen(*qkv())[0] == "sdpa"
    assert chosen(*qkv(8))[1].startswith("chosen: older")  # fewer queries than were measured


def test_a_file_may_be_named(monkeypatch, tmp_path):
    path = written(SDPA_FIRST, path=tmp_path / "mine.json")
    assert chosen(*qkv())[0] == "cpu"
    monkeypatch.setenv(tuning.VARIABLE, str(path))
    tuning.clear_cache()
    assert chosen(*qkv())[0] == "sdpa"


def test_rules_of_another_family_change_nothing(monkeypatch, tmp_path):
    path = written(SDPA_FIRST, family="vax", path=tmp_path / "mine.json")
    monkeypatch.setenv(tuning.VARIABLE, str(path))
    tuning.clear_cache()
    assert chosen(*qkv()) == ("cpu", "chosen")


WRONG = [
    "", "[]", "3", '"schema"', "{", '{"schema": "x", "rules": []}', "\x00\xff" * 9, "[" * 100_000,
    {"rules": [3]}, {"rules": 3}, {"rules": [{"order": ["sdpa"]}]}, {"measured": 3, "rules": []},
    {"rules": [{"order": "sdpa", **WINS}]}, {"rules": [{"order": [3], **WINS}]},
    {"rules": [{"order": ["sdpa"], "why": 3, "source": "x"}]},
    {"rules": [{"order": ["sdpa"], "dtype": "bfloat16", **WINS}]},
    {"rules": [{"order": ["sdpa"], "keys": [float("inf"), None], **WINS}]},
    {"rules": [{"order": ["sdpa"], "keys": [[], {}], **WINS}]},
    {"rules": [{"order": ["sdpa"], "extras": [["none"]], **WINS}]},
    {"rules": [{"order": ["sdpa"], "place": "here", **WINS}]},
]  # fmt: skip


@pytest.mark.parametrize("text", WRONG, ids=lambda text: str(text)[:40])
def test_a_damaged_file_is_ignored_with_one_sentence(text):
    path = written()
    if isinstance(text, dict):
        text = json.dumps({"schema": tuning.SCHEMA, "architecture": processor_family()} | text)
    path.write_bytes(text.encode("latin-1"))
    tuning.clear_cache()
    q, k, v = qkv()
    call = make_call(q, DenseKV(k, v), mask=Mask())
    with pytest.warns(UserWarning) as caught:
        assert dispatch.choose(call, "auto") is cpu
    assert len(caught) == 1
    said = str(caught[0].message)
    assert said.startswith(str(path)) and "\n" not in said
    assert said.endswith("It is ignored; delete it, or measure again with: saccade bench tune.")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen(q, k, v) == ("cpu", "chosen")  # and only once


def test_a_file_that_is_named_and_missing_is_said(monkeypatch, tmp_path):
    monkeypatch.setenv(tuning.VARIABLE, str(tmp_path / "gone.json"))
    with pytest.warns(UserWarning, match=r"gone.json is not a list of rules: No such file"):
        assert chosen(*qkv())[0] == "cpu"


def test_backends_that_do_not_exist_are_passed_over():
    written(Rule(order=("fpga", "reference", "sdpa"), **WINS))
    assert explain(*qkv())[0][0] == "sdpa"
    assert chosen(*qkv())[0] == "sdpa"


def test_rules_that_only_explain_cost_a_call_nothing(monkeypatch):
    written(Rule(order=("cpu", "sdpa"), **WINS), SDPA_FIRST)
    q, k, v = qkv()
    step = make_call(q[:, :, :1], DenseKV(k, v), mask=Mask())
    monkeypatch.setattr(rules, "facts_of", lambda call: pytest.fail("read the facts of a call"))
    assert dispatch.choose(step, "auto") is cpu
    written(Rule(order=("cpu", "sdpa"), **WINS))
    assert dispatch.choose(make_call(q, DenseKV(k, v), mask=Mask()), "auto") is cpu


def test_where_a_square_rule_begins():
    square = Rule(order=("sdpa",), square=True, keys=(2048, 4096), **WINS)
    assert tuning.RuleSet([square]).fewest_queries == 2048
    assert tuning.NO_RULES.fewest_queries > tuning.LARGEST


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_rule_takes_is_right(dtype):
    tensors = qkv(93, dtype)  # a size of its own: nothing was chosen for it before
    truth = attention(*[x.double() for x in tensors], backend="reference")
    eager = attention(*tensors, backend="reference")
    written(SDPA_FIRST)
    assert chosen(*tensors)[0] == "sdpa"
    assert_as_exact(attention(*tensors), eager, truth)


def counted(monkeypatch, module, name):
    """How often a function of a backend ran."""
    ran = []
    right = getattr(module, name)

    def function(*args):
        ran.append(name)
        return right(*args)

    monkeypatch.setattr(module, name, function)
    return ran


def test_a_compiled_graph_follows_the_rules_when_it_runs(monkeypatch):
    written(SDPA_FIRST)
    ran = counted(monkeypatch, sdpa, "forward")
    tensors = qkv()
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        out = compiled(*tensors)
    assert ran == ["forward"] and out.is_contiguous()
    torch.testing.assert_close(out, attention(*tensors, backend="cpu"), atol=1e-5, rtol=0)


def test_gradients_follow_rules_of_their_own(monkeypatch):
    written(SDPA_FIRST)
    tensors = qkv(requires_grad=True)
    assert chosen(*tensors)[0] == "cpu"
    expected = torch.autograd.grad(attention(*tensors).square().sum(), tensors)
    path = written(Rule(order=("sdpa", "cpu"), training=True, square=True, **WINS))
    assert chosen(*tensors) == (
        "sdpa", f"chosen: twice the speed (measured 2026-01-01, rule 1 of {path})",
    )  # fmt: skip
    ran = counted(monkeypatch, sdpa, "run")
    found = torch.autograd.grad(attention(*tensors).square().sum(), tensors)
    assert ran
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    # PyTorch's lse has no gradient, so this call goes on to the next backend.
    assert chosen(*tensors, return_lse=True)[0] == "cpu"
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
    again = torch.autograd.grad(compiled(*tensors).square().sum(), tensors)
    torch.testing.assert_close(again, expected, atol=1e-5, rtol=1e-5)


def amx(**facts):
    """What the package's rules put first on a Xeon with AMX."""
    base = {"head_dim": 128, "pattern": "causal", "training": False, "storage": "dense"}
    base |= {"queries": 2048, "keys": 2048, "rows": 65536, "group_rows": 8192}
    file = tuning.read_file(PACKAGE / "amx.json")
    found = tuning.RuleSet(file.rules).fitting(Facts(**base | facts))
    return found[0].order if found else None


PACKAGE = tuning.FOLDER


def test_the_rules_of_amx_hold_where_they_were_measured():
    cpu = ("cpu", "sdpa")
    assert amx() == amx(head_dim=64) == amx(queries=8192, keys=8192) == cpu
    assert amx(dtype="float32") == amx(dtype="float16", head_dim=64) == amx(keys=4096) == cpu
    for unmeasured in (
        {"queries": 256, "keys": 256}, {"queries": 256, "keys": 4096}, {"pattern": "all"},
        {"pattern": "window"}, {"extras": "attn_mask"}, {"storage": "pages"}, {"training": True},
        {"head_dim": 256}, {"queries": 1, "keys": 32768},
    ):  # fmt: skip
        assert amx(**unmeasured) is None, unmeasured


def test_a_machine_with_amx_says_which_rule_it_follows(monkeypatch):
    monkeypatch.setattr(tuning, "FOLDER", PACKAGE)
    monkeypatch.setattr(rules, "processor_family", lambda: "amx")
    tuning.clear_cache()
    q = torch.empty(1, 8, 2048, 128, dtype=torch.bfloat16)
    name, said = chosen(q, q[:, :2], q[:, :2])
    assert name == "cpu" and "1.80 to 2.18 times the speed of PyTorch's SDPA" in said
    assert said.endswith("(amx_rules, rule 5 of amx.json)")
    name, said = chosen(q[:, :, :100], q[:, :2], q[:, :2])
    assert name == "cpu" and "amx.json" not in said
