"""Measured facts about backends, and what `auto` and `explain` make of them."""

import json

import pytest
import torch

from saccade.core import BadInput, DenseKV, Mask, PagedKV
from saccade.ops import explain
from saccade.ops.attention import dispatch, rules
from saccade.ops.attention.api import make_call
from saccade.ops.attention.nvidia import gluon_backend as gluon
from saccade.ops.attention.nvidia import training as gluon_training
from saccade.ops.attention.nvidia import triton_backend as triton
from saccade.ops.attention.rules import Rule
from saccade.ops.attention.sdpa import backend as sdpa

WINS = {"why": "twice the speed", "source": "some_record"}


@pytest.fixture
def a_card(monkeypatch):
    """Tensors on the meta device count as a GPU that has all kernels; rules as given."""

    def given_rules(*given):
        monkeypatch.setattr(
            rules, "rules_for", lambda device: given if device.type == "meta" else ()
        )
        for module in (gluon, sdpa, triton):
            monkeypatch.setattr(module, "refusal", lambda call: None)

    return given_rules


def meta(length=4096, dim=128, queries=None):
    q = torch.empty(1, 32, queries or length, dim, dtype=torch.bfloat16, device="meta")
    return q, q[:, :8, :1].expand(1, 8, length, dim), q[:, :8, :1].expand(1, 8, length, dim)


def call_of(length=4096, dim=128, queries=None, **mask):
    q, k, v = meta(length, dim, queries)
    return make_call(q, DenseKV(k, v), mask=Mask(**mask))


def test_every_rule_of_the_package_can_be_read():
    for path in rules.FOLDER.glob("*.json"):
        for rule in rules.read(path):
            assert set(rule.order) <= set(dispatch.AUTO_ORDER)
            assert rule.why and rule.source and rule.min_keys and rule.min_rows


def test_a_rule_puts_its_backends_first_and_says_why(a_card):
    a_card(Rule(order=("sdpa", "gluon"), head_dim=(96, 256), min_keys=2048, **WINS))
    lines = explain(*meta())
    assert [name for name, _ in lines][:4] == ["sdpa", "gluon", "triton", "cpu"]
    assert lines[0][1] == "chosen: twice the speed (some_record)"
    assert lines[1][1] == lines[2][1] == "able, slower here"
    assert dispatch.choose(call_of(), "auto") is sdpa


def test_a_rule_whose_backend_cannot_run_the_call(a_card, monkeypatch):
    a_card(Rule(order=("sdpa",), **WINS))
    monkeypatch.setattr(sdpa, "refusal", lambda call: "no")
    assert dict(explain(*meta()))["triton"] == "chosen"
    assert dispatch.choose(call_of(), "auto") is triton


def test_gluon_is_taken_only_where_it_was_measured(a_card):
    a_card(Rule(order=("gluon",), min_keys=4096, min_rows=32 * 4096, **WINS))
    assert dict(explain(*meta()))["gluon"] == "chosen: twice the speed (some_record)"
    short = dict(explain(*meta(queries=100)))
    assert short["triton"] == "chosen"
    assert short["gluon"] == (
        "able, but it was measured to win only from 4096 keys and 131072 rows "
        "(batch x heads x queries), here 4096 and 3200"
    )
    a_card()
    assert dict(explain(*meta()))["gluon"] == (
        "able, but it was measured to win only for other calls"
    )


@pytest.mark.parametrize(
    ("conditions", "call", "fits"),
    [
        ({}, call_of(), True),
        ({"head_dim": (65, 127)}, call_of(), False),
        ({"pattern": ("all",)}, call_of(), False),
        ({"pattern": ("all",)}, call_of(causal=False), True),
        ({"pattern": ("window",)}, call_of(window=128), True),
        ({"pattern": ("causal",)}, call_of(window=4096), True),
        ({"training": True}, call_of(), False),
        ({"square": True}, call_of(queries=64), False),
        ({"max_keys": 4095}, call_of(), False),
        ({"min_rows": 32 * 4096 + 1}, call_of(), False),
        ({}, call_of(queries=16), False),
        ({"min_queries": 1}, call_of(queries=16), True),
    ],
)
def test_conditions(conditions, call, fits):
    assert Rule(order=("gluon",), **WINS, **conditions).fits(call) == fits


def calls_by_rows(length=4096):
    """A call for each of rules.ROWS, and one whose documents are short."""
    q, k, v = meta(length)
    pool = torch.empty(length // 64, 8, 64, 128, dtype=torch.bfloat16, device="meta")
    ends = torch.tensor([length])
    table = torch.empty(1, length // 64, dtype=torch.int32, device="meta")
    packed = {n: torch.arange(0, length + 1, length // n, dtype=torch.int32) for n in (2, 256)}
    dense, mask = DenseKV(k, v), Mask()
    return {
        "even": make_call(q, dense, mask=mask),
        "packed": make_call(q, dense, mask=mask, cu_seqlens=packed[2]),
        "lengths": make_call(q, dense, mask=mask, kv_lens=ends),
        "pages": make_call(q, PagedKV(pool, pool, table, ends.int(), length), mask=mask),
        "short": make_call(q, dense, mask=mask, cu_seqlens=packed[256]),
    }


@pytest.mark.parametrize("kind", rules.ROWS)
def test_a_rule_speaks_of_one_kind_of_rows(kind):
    rule = Rule(order=("gluon",), rows=(kind,), min_keys=1024, **WINS)
    fitting = [name for name, call in calls_by_rows().items() if rule.fits(call)]
    assert fitting == [kind]


def test_documents_count_by_their_mean_length(a_card):
    a_card(Rule(order=("gluon",), rows=("packed",), min_keys=1024, **WINS))
    verdicts = {name: dict(dispatch.explain(call)) for name, call in calls_by_rows().items()}
    assert verdicts["packed"]["gluon"] == "chosen: twice the speed (some_record)"
    assert verdicts["short"]["gluon"].endswith("here 16 and 131072")
    assert verdicts["even"]["triton"] == verdicts["short"]["triton"] == "chosen"


def test_steps_of_decoding_are_not_prefill(a_card):
    a_card(Rule(order=("gluon",), **WINS))
    verdict = dict(explain(*meta(queries=16)))["gluon"]
    assert verdict == "able, but it was measured to win only from 17 queries a row"


def test_a_rule_about_one_kernel_needs_that_kernel(a_card, monkeypatch):
    a_card(Rule(order=("sdpa",), kernel="cudnn", **WINS))
    for kernel, taken in (("cudnn", "sdpa"), ("flash", "triton")):
        monkeypatch.setattr(sdpa, "kernel_of", lambda call, kernel=kernel: kernel)
        assert dict(explain(*meta()))[taken].startswith("chosen")


def test_the_rules_for_hopper(monkeypatch):
    """What auto asks first there; cuDNN only where its plans pay."""
    monkeypatch.setattr(sdpa, "kernel_of", lambda call: "cudnn")

    def first(*shape, **mask):
        fitting = (rule for rule in rules.rules("sm_90") if rule.fits(call_of(*shape, **mask)))
        return next((rule.order[0] for rule in fitting), None)

    assert first(1024, 128) == first(4096, 64) == first(32768, 256, causal=False) == "gluon"
    assert first(1024, 64) is None and first(2048, 128, window=100) is None
    assert first(4096, 128, window=1024) == "gluon"
    assert first(16384, 192) is None and first(32768, 192) == "sdpa"
    assert first(16384, 96) is first(32768, 96) is None
    assert first(32768, 96, causal=False) == first(16384, 192, causal=False) == "sdpa"
    assert first(8192, 128, 64) == "gluon" and first(4096, 128, 64) is None
    found = {
        name: next((rule.order[0] for rule in rules.rules("sm_90") if rule.fits(call)), None)
        for name, call in calls_by_rows(32768).items()
    }
    assert found == dict.fromkeys(rules.ROWS, "gluon") | {"short": None}


def test_whose_gradients_hopper_gets():
    def gluon(keys, dim=128, **mask):
        q, _, _ = meta(keys, dim)
        mask = Mask(**mask)
        facts = rules.facts_about(q, keys, mask.causal, mask.window, training=True)
        return any(r.kernel == "gluon" and r.covers(facts) for r in rules.rules("sm_90"))

    assert gluon(512) and gluon(8192, 64) and gluon(1024, causal=False) and gluon(2048, window=512)
    assert not (gluon(256) or gluon(512, causal=False) or gluon(1024, window=512))
    assert not gluon(8192, 256)


def test_training_is_a_condition():
    q, k, v = (torch.empty(1, 2, 32, 16, requires_grad=True) for _ in range(3))
    call = make_call(q, DenseKV(k, v), mask=Mask())
    assert Rule(order=("sdpa",), training=True, **WINS).fits(call)
    assert not Rule(order=("sdpa",), **WINS).fits(call)


def test_explain_says_whose_gradients_a_call_gets(a_card, monkeypatch):
    rule = {"order": ("triton",), "kernel": "gluon", "training": True}
    a_card(Rule(**rule, why="gradients by the Gluon kernels", source="some_record"))
    monkeypatch.setattr(gluon_training, "gluon_refusal", lambda device: None)
    q, k, v = (x.contiguous().requires_grad_() for x in meta())
    verdict = "chosen: gradients by the Gluon kernels (some_record)"
    assert dict(explain(q, k, v))["triton"] == verdict
    assert dict(explain(q, k, v, softcap=9.0))["triton"] == "chosen"
    torch.use_deterministic_algorithms(True)
    try:
        assert dict(explain(q, k, v))["triton"] == "chosen"
    finally:
        torch.use_deterministic_algorithms(False)


def test_cpu_calls_ask_no_rule():
    x = torch.empty(1, 1, 4, 16)
    assert rules.preferred(make_call(x, DenseKV(x, x), mask=Mask())) is None


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"order": ["gluon"]}, "rule 1: .*missing"),
        ({"order": [], **WINS}, "order needs a backend"),
        ({"order": ["gluon"], "heads": 3, **WINS}, "unknown condition 'heads'; there are order, "),
        ({"order": ["gluon"], "pattern": ["causl"], **WINS}, "pattern takes causal, all, window"),
        ({"order": ["gluon"], "rows": ["paged"], **WINS}, "rows even, packed, lengths, pages"),
        ({"order": ["gluon"], "kernel": "x", **WINS}, "that begins with sdpa or triton"),
    ],
)
def test_wrong_rules_are_named(tmp_path, row, reason):
    path = tmp_path / "sm_1.json"
    path.write_text(json.dumps({"schema": rules.SCHEMA, "rules": [row]}))
    with pytest.raises(BadInput, match=reason):
        rules.read(path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": "x", "rules": []}'])
def test_a_file_that_is_none(tmp_path, text):
    path = tmp_path / "sm_1.json"
    path.write_text(text)
    with pytest.raises(BadInput, match="is not a list of rules"):
        rules.read(path)
