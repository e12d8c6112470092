"""Which backend computes a call: measured rules as data, the order of `auto`, and `explain`."""

import json
from pathlib import Path

import pytest
import torch

from saccade.core import BadInput, DenseKV, Mask, PagedKV, QuantizedKV, Span, Unsupported
from saccade.core.formats import quantize_keys, quantize_values
from saccade.ops import attend, explain
from saccade.ops.attention import dispatch, rules
from saccade.ops.attention.api import make_call
from saccade.ops.attention.nvidia import gluon_backend, gluon_triton_backend, triton_backend
from saccade.ops.attention.nvidia.gluon.backward import support as gluon_gradients
from saccade.ops.attention.rules import Rule, RuleSet
from saccade.ops.attention.sdpa import backend as sdpa
from saccade.ops.tuning import rules as tuning

WINS = {"why": "twice the speed", "source": "some_record"}


@pytest.fixture
def with_rules(monkeypatch):
    """Tensors on the meta device count as a GPU that has all kernels; rules as given."""

    def given(*found):
        measured = RuleSet(found)
        monkeypatch.setattr(
            rules, "rules_for", lambda device: measured if device.type == "meta" else rules.NO_RULES
        )
        for module in (gluon_backend, gluon_triton_backend, sdpa, triton_backend):
            monkeypatch.setattr(module, "refusal", lambda call: None)

    return given


def meta(length=4096, dim=128, queries=None):
    q = torch.empty(1, 32, queries or length, dim, dtype=torch.bfloat16, device="meta")
    return q, q[:, :8, :1].expand(1, 8, length, dim), q[:, :8, :1].expand(1, 8, length, dim)


def call_of(length=4096, dim=128, queries=None, **mask):
    q, k, v = meta(length, dim, queries)
    return make_call(q, DenseKV(k, v), mask=Mask(**mask))


def fits(rule, call):
    return rule.fits(rules.facts_of(call))


def test_every_rule_of_the_package_has_a_record_with_a_revision():
    results = Path(__file__).parents[2] / "benchmarks/results"
    for path in tuning.FOLDER.glob("*.json"):
        for rule in tuning.read(path):
            assert set(rule.order) <= set(dispatch.AUTO_ORDER) and rule.why
            record = json.loads((results / f"{rule.source}.json").read_text())
            assert record["revision"] and record["command"] and record["complete"]


def test_a_rule_puts_its_backends_first_and_says_why(with_rules):
    with_rules(Rule(order=("sdpa", "gluon"), head_dim=(96, 256), keys=(2048, 2**62), **WINS))
    lines = explain(*meta())
    assert [name for name, _ in lines][:4] == ["sdpa", "gluon", "gluon_triton", "triton"]
    assert lines[0][1] == "chosen: twice the speed (some_record)"
    assert lines[1][1] == lines[3][1] == "supported, slower here"
    assert dispatch.choose(call_of(), "auto") is sdpa


def test_a_rule_whose_backend_cannot_run_the_call(with_rules, monkeypatch):
    with_rules(Rule(order=("sdpa",), **WINS))
    monkeypatch.setattr(sdpa, "refusal", lambda call: "no")
    assert dict(explain(*meta()))["triton"] == "chosen"
    assert dispatch.choose(call_of(), "auto") is triton_backend


def test_gluon_is_taken_only_where_it_was_measured(with_rules):
    with_rules(Rule(order=("gluon",), keys=(4096, 2**62), rows=(32 * 4096, 2**62), **WINS))
    assert dict(explain(*meta()))["gluon"] == "chosen: twice the speed (some_record)"
    short = dict(explain(*meta(queries=100)))
    assert short["triton"] == "chosen"
    assert short["gluon"] == (
        "supported, but it was measured to win only from 131072 rows (batch x heads x queries) on, "
        "here 3200"
    )
    with_rules(Rule(order=("gluon",), pattern=("window",), **WINS))
    assert dict(explain(*meta()))["gluon"] == (
        "supported, but it was measured to win only for other calls"
    )
    with_rules()
    assert dict(explain(*meta()))["gluon"] == (
        "supported, but no measurement of this machine puts it first"
    )


@pytest.mark.parametrize(
    ("conditions", "call", "expected"),
    [
        ({}, call_of(), True),
        ({"head_dim": (65, 127)}, call_of(), False),
        ({"pattern": ("all",)}, call_of(), False),
        ({"pattern": ("all",)}, call_of(causal=False), True),
        ({"pattern": ("window",)}, call_of(window=128), True),
        ({"pattern": ("causal",)}, call_of(window=4096), True),
        ({"training": True}, call_of(), False),
        ({"square": True}, call_of(queries=64), False),
        ({"keys": (1, 4095)}, call_of(), False),
        ({"rows": (32 * 4096 + 1, 2**62)}, call_of(), False),
        ({"queries": (17, 2**62)}, call_of(queries=16), False),
        ({"queries": (1, 16), "group_rows": (1, 64)}, call_of(queries=16), True),
        ({"queries": (1, 16), "group_rows": (1, 63)}, call_of(queries=16), False),
    ],
)
def test_conditions(conditions, call, expected):
    assert fits(Rule(order=("gluon",), **WINS, **conditions), call) == expected


def calls_by_storage(length=4096):
    """A call for each of tuning.STORAGE, and one whose packed sequences are short."""
    q, k, v = meta(length)
    pool = torch.empty(length // 64, 8, 64, 128, dtype=torch.bfloat16, device="meta")
    ends = torch.empty(1, dtype=torch.int64, device="meta")
    table = torch.empty(1, length // 64, dtype=torch.int32, device="meta")
    packed = {n: torch.empty(n + 1, dtype=torch.int32, device="meta") for n in (2, 256)}
    dense, mask = DenseKV(k, v), Mask()
    ring = DenseKV(k, v, (Span(0, 64, length - 64), Span(length - 64, length, 64)))
    float_k = k.float()
    keys = quantize_keys(float_k, bits=8, group=64)
    values = quantize_values(float_k, bits=8, group=64)
    quantized = QuantizedKV(keys, values, k[:, :, :0], v[:, :, :0], 8, 8, 64)
    return {
        "dense": make_call(q, dense, mask=mask),
        "packed": make_call(q, dense, mask=mask, cu_seqlens=packed[2]),
        "kv_lens": make_call(q, dense, mask=mask, kv_lens=ends),
        "pages": make_call(q, PagedKV(pool, pool, table, ends.int(), length), mask=mask),
        "ring": make_call(q, ring, mask=mask),
        "quantized": make_call(q, quantized, mask=mask),
        "short": make_call(q, dense, mask=mask, cu_seqlens=packed[256]),
    }


@pytest.mark.parametrize("kind", tuning.STORAGE)
def test_a_rule_is_about_kinds_of_storage(kind):
    rule = Rule(order=("gluon",), storage=(kind,), keys=(1024, 2**62), **WINS)
    assert [name for name, call in calls_by_storage().items() if fits(rule, call)] == [kind]


def test_packed_sequences_count_by_their_mean_length(with_rules):
    with_rules(Rule(order=("gluon",), storage=("packed",), keys=(1024, 2**62), **WINS))
    calls = calls_by_storage()
    verdicts = {n: dict(dispatch.explain(calls[n])) for n in ("packed", "short", "dense")}
    assert verdicts["packed"]["gluon"] == "chosen: twice the speed (some_record)"
    assert verdicts["short"]["gluon"].endswith("from 1024 keys on, here 16")
    assert verdicts["dense"]["triton"] == verdicts["short"]["triton"] == "chosen"


def test_packed_sequences_on_the_meta_device_are_planned_and_not_computed():
    with pytest.raises(Unsupported, match="cu_seqlens in a meta tensor cannot be read"):
        attend(calls_by_storage(512)["packed"], backend="tiled")


def test_a_rule_about_one_kernel_needs_that_kernel(with_rules, monkeypatch):
    with_rules(Rule(order=("sdpa",), kernel="cudnn", **WINS))
    for kernel, taken in (("cudnn", "sdpa"), ("flash", "triton")):
        monkeypatch.setattr(sdpa, "kernel_of", lambda call, kernel=kernel: kernel)
        assert dict(explain(*meta()))[taken].startswith("chosen")


def first_on_hopper(call, *, packages=False, **facts):
    """The backend that the package's rules put first, where cuDNN is available.

    Args:
        packages: every package of others is installed, instead of none.
    """
    found = tuning.rules("sm_90").fitting(rules.facts_of(call.with_(**facts)))
    names = [rule.order[0] for rule in found]
    peers = [name for name in names if name in dispatch.PEERS and packages]
    return next((name for name in [*peers, *names] if packages or name not in dispatch.PEERS), None)


def test_the_rules_for_hopper():
    """Prefill: Gluon from the lengths on where it was measured."""

    def first(*shape, **mask):
        return first_on_hopper(call_of(*shape, **mask))

    assert first(1024, 128) == first(4096, 64) == first(32768, 256, causal=False) == "gluon"
    assert first(1024, 64) is None and first(2048, 128, window=100) is None
    assert first(4096, 128, window=1024) == "gluon"
    assert first(2048, 192) == first(2048, 96) == first(2048, 80, causal=False) == "gluon"
    assert first(1024, 192) is first(16384, 48) is first(16384, 96, window=100) is None
    assert first(4096, 128, 64) == first(4096, 64, 128) == first(4096, 256, 512) == "gluon"
    assert first(2048, 128, 64) is first(4096, 64, 129) is first(4096, 128, 9) is None
    found = {name: first_on_hopper(call) for name, call in calls_by_storage(32768).items()}
    assert found == dict.fromkeys(tuning.STORAGE, "gluon") | {"ring": None, "short": None}


def test_the_rules_for_packages_of_others_on_hopper():
    def first(*shape, **mask):
        return first_on_hopper(call_of(*shape, **mask), packages=True)

    assert (
        first(4096, 96) == first(4096, 192, causal=False) == first(8192, 128, causal=False) == "fa3"
    )
    assert first(4096, 128, causal=False) == first(8192, 128) == first(2048, 96) == "gluon"


def test_the_rules_for_decoding_on_hopper():
    def first(keys, dim, queries=1, **mask):
        return first_on_hopper(call_of(keys, dim, queries, **mask))

    assert first(64, 128) == first(8192, 64) == first(8192, 128, 2) == "gluon"
    assert first(63, 128) is first(8192, 128, 3) is None  # few keys; twelve rows of a group
    assert first(8192, 128, window=512) == "gluon" and first(8192, 64, window=512) is None
    quantized = calls_by_storage()["quantized"]
    for queries, expected in ((1, "gluon"), (8, "gluon"), (9, None)):
        assert first_on_hopper(quantized, q=quantized.q[:, :, :queries]) == expected


def test_the_rules_for_gradients_on_hopper():
    def first(keys, dim=128, **mask):
        return first_on_hopper(call_of(keys, dim, **mask), training=True)

    won = first(512), first(8192, 64), first(1024, causal=False), first(2048, window=512)
    assert won == ("gluon",) * 4
    assert first(256) is first(512, causal=False) is first(1024, window=512) is None
    assert first(8192, 256) == first(8192, 256, causal=False) == "sdpa"
    assert first(4096, 256, causal=False) == first(8192, 256, window=512) == "gluon_triton"


def test_training_is_a_condition():
    q, k, v = (torch.empty(1, 2, 32, 16, requires_grad=True) for _ in range(3))
    call = make_call(q, DenseKV(k, v), mask=Mask())
    assert fits(Rule(order=("sdpa",), training=True, **WINS), call)
    assert not fits(Rule(order=("sdpa",), **WINS), call)


def test_deterministic_gradients_are_tritons(monkeypatch):
    """The rule's next backend serves where the first one refuses, and explain says so."""
    order = {"order": ("gluon", "gluon_triton"), "training": True}
    rule = Rule(**order, why="faster gradients", source="some_record")
    monkeypatch.setattr(rules, "rules_for", lambda device: RuleSet([rule]))
    for module in (gluon_backend, gluon_triton_backend):
        monkeypatch.setattr(module, "gluon_refusal", lambda device: None)
    monkeypatch.setattr(triton_backend, "triton_refusal", lambda device: None)
    q, k, v = (x.contiguous().requires_grad_() for x in meta())
    verdict = "chosen: faster gradients (some_record)"
    assert dict(explain(q, k, v))["gluon"] == verdict
    assert dict(explain(q, k, v, softcap=9.0))["gluon_triton"] == verdict
    assert dict(explain(q, k, v, scale=-1.0))["triton"] == "chosen"
    torch.use_deterministic_algorithms(True)
    try:
        found = dict(explain(q, k, v))
    finally:
        torch.use_deterministic_algorithms(False)
    assert "no fixed order" in found["gluon"] and found["gluon_triton"] == verdict


def gradient_call(dim=128, dtype=torch.bfloat16, **options):
    q, k = (torch.empty(1, h, 256, dim, dtype=dtype, device="meta") for h in (4, 1))
    return make_call(q, DenseKV(k, k), mask=Mask(), **options).with_(training=True)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"softcap": 9.0}, "no softcap and no alibi_slopes"),
        ({"dim": 256}, "head_dim 256 is not one of 64, 128"),
        ({"dtype": torch.float32}, "float32 is not one of"),
        ({"scale": -1.0}, "scale must be positive"),
    ],
    ids=["softcap", "dim", "dtype", "scale"],
)
def test_gluon_gradients_refuse_in_a_sentence(monkeypatch, wrong, reason):
    assert "not on an NVIDIA GPU" in gluon_backend.refusal(gradient_call())
    assert gluon_gradients.refusal(gradient_call()) is None
    assert reason in gluon_gradients.refusal(gradient_call(**wrong))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"order": ["gluon"]}, "rule 1: .*missing"),
        ({"order": [], **WINS}, "order needs a backend"),
        ({"order": ["gluon"], "heads": 3, **WINS}, "unknown condition 'heads'; there are order, "),
        ({"order": ["gluon"], "pattern": ["causl"], **WINS}, "pattern takes causal, all, window"),
        (
            {"order": ["gluon"], "storage": ["paged"], **WINS},
            "storage takes dense, packed",
        ),
        ({"order": ["gluon"], "kernel": "cudnn", **WINS}, "that begins with sdpa"),
        ({"order": ["gluon"], "keys": 512, **WINS}, r"keys must be \[smallest, largest\], null"),
    ],
)
def test_wrong_rules_are_named(tmp_path, row, reason):
    path = tmp_path / "sm_1.json"
    path.write_text(json.dumps({"schema": tuning.SCHEMA, "rules": [row]}))
    with pytest.raises(BadInput, match=reason):
        tuning.read(path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": "x", "rules": []}'])
def test_a_file_without_rules(tmp_path, text):
    path = tmp_path / "sm_1.json"
    path.write_text(text)
    with pytest.raises(BadInput, match="is not a list of rules"):
        tuning.read(path)
