"""Packages of others as backends: against fakes of their signatures here, themselves on a GPU."""

import re
from types import SimpleNamespace

import pytest
import torch

from saccade.core import DenseKV, Mask, PagedKV, Unsupported
from saccade.ops import attend, attention, explain, make_call
from saccade.ops.attention import dispatch, known, rules
from saccade.ops.attention.peers import fa3, flash_attn, installed
from saccade.ops.attention.rules import Rule, RuleSet
from tests.support import matrix, peers
from tests.support.cases import LENGTHS, MASKS, Case
from tests.support.gpu import on_gpu, where_it_runs
from tests.support.random_inputs import normal, qkv
from tests.support.reference import check_case
from tests.support.tolerance import ALLOWANCE, assert_lse, largest_error

PEERS = dispatch.PEERS
CELLS = [c for c in matrix.cells() if c.backend in PEERS and c.supported and "tensors" not in c.row]
EXTRAS = ("plain", "softcap", "sink_logits", "alibi", "packed")
ROW_OF_EXTRA = {"plain": "causal", "packed": "cu_seqlens", "alibi": "alibi_slopes"}
WINS = {"why": "1.1 times Gluon's speed", "source": "some_record"}
NEAR = 2 * ALLOWANCE[torch.bfloat16]


@pytest.fixture
def fakes(monkeypatch):
    """Every peer seems to be installed, on a GPU."""
    peers.pretend_installed(monkeypatch)
    yield
    known.clear()


def solve(given, backend, row):
    """(output, lse or None, gradients), from the same random weights each time."""
    result = attend(make_call(given.q, given.kv, **given.options), backend=backend)
    grads, out, lse = [], result.out.cpu(), result.lse.cpu()
    if given.leaves:
        torch.manual_seed(2)
        weights = [torch.randn(x.shape) for x in (out, lse)]  # not in the order of strides
        loss = (out * weights[0]).sum()
        loss = loss + (lse * weights[1]).sum() if row == "lse" else loss
        grads = torch.autograd.grad(loss, given.leaves)
    return out, lse if row == "lse" else None, grads


def check_cell(cell, given):
    """Fail unless a call of the matrix equals the reference's, which runs on the CPU."""
    out, lse, grads = solve(given, cell.backend, cell.row)
    torch.manual_seed(1)
    true_out, true_lse, true_grads = solve(matrix.call_of(cell), "reference", cell.row)
    assert out.dtype == true_out.dtype and largest_error(out, true_out) <= NEAR
    if lse is not None:
        assert_lse(lse, true_lse, 1e-3)
    for found, true in zip(grads, true_grads, strict=True):
        assert largest_error(found, true) <= 2 * NEAR * max(1.0, float(true.abs().max()))


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_an_adapter_asks_for_what_the_reference_computes(cell, fakes):
    torch.manual_seed(1)
    check_cell(cell, matrix.call_of(cell))


def cases():
    """(backend, case): masks and lengths for each extra that the backend takes in a prompt."""
    found = []
    for name in PEERS:
        extras = [x for x in EXTRAS if "P" in matrix.ROWS[ROW_OF_EXTRA.get(x, x)][name]]
        for i, extra in enumerate(extras):
            for j, mask in enumerate(MASKS):
                heads, lengths = ((6, 2), (4, 4))[(i + j) % 2], LENGTHS[(i + j) % len(LENGTHS)]
                batch = matrix.BATCH.get(name, 2)
                case = Case(heads, lengths, mask, extra, head_dim=64, batch=batch, seed=j)
                found.append((name, case))
    return found


REFUSED = (
    "it cannot keep the first keys visible|this build of it .* has no"
    "|no more queries than keys under a causal mask|takes the last query for that of the last key"
)


def check_or_refused(name, case, device="cpu"):
    """A case, where what it names beyond the matrix's row is served; else the sentence."""
    try:
        check_case(case, name, torch.bfloat16, device, lse_allowance=1e-3)
    except Unsupported as error:
        assert re.search(REFUSED, str(error)), error


@pytest.mark.parametrize(("name", "case"), cases(), ids=str)
def test_masks_and_lengths(name, case, fakes):
    check_or_refused(name, case)


def test_what_is_missing_is_said_without_an_import(monkeypatch):
    monkeypatch.setattr(installed, "gpu_refusal", lambda *_: None)
    monkeypatch.setattr(installed, "is_found", lambda module, file="": False)
    monkeypatch.setattr(installed, "_tried", lambda module: pytest.fail("nothing is imported"))
    verdicts = dict(explain(*qkv(dim=64, dtype=torch.bfloat16)))
    packages = ("flash_attn_3 or fa3-fwd", "flash-attn-4", "flash-attn", "flashinfer")
    for name, package in zip(PEERS, packages, strict=True):
        assert verdicts[name] == f"cannot: the package {package} is not installed"


def test_on_a_cpu_nothing_is_looked_for(monkeypatch):
    monkeypatch.setattr(installed, "is_found", lambda *_: pytest.fail("no package is looked for"))
    verdicts = dict(explain(*qkv(dim=64, dtype=torch.bfloat16)))
    assert {verdicts[name] for name in PEERS} == {
        "cannot: tensors are on cpu, not on an NVIDIA GPU"
    }


def test_a_package_that_does_not_import(fakes, monkeypatch):
    monkeypatch.setattr(installed, "_tried", lambda module: ImportError("undefined\n symbol"))
    with pytest.raises(Unsupported, match=r"cannot be imported \(ImportError: undefined sym"):
        attention(*qkv(dim=64, dtype=torch.float16), backend="flash_attn")


def test_a_folder_that_packages_share(tmp_path, monkeypatch):
    (tmp_path / "some_peer/cute").mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path)
    assert installed.is_found("some_peer")
    assert not installed.is_found("some_peer", "cute/interface.py")
    (tmp_path / "some_peer/cute/interface.py").touch()
    installed.is_found.cache_clear()
    assert installed.is_found("some_peer", "cute/interface.py")
    assert not installed.is_found("no_such_peer", "cute/interface.py")
    assert "no_such_peer" in installed.import_refusal("no_such_peer")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": torch.float16}, "has no float16"),
        ({"window": 5}, "has no windows"),
        ({"training": True}, "has no gradients"),
        ({"dim": 80}, None),
    ],
    ids=str,
)
def test_what_a_build_lacks_is_read_from_its_flags(change, reason, monkeypatch):
    peers.pretend_installed(monkeypatch, without=("flash_attn_interface", "flash_attn_config"))
    dim, dtype = change.get("dim", 64), change.get("dtype", torch.bfloat16)
    q, k, v = qkv(dim=dim, dtype=dtype)
    call = make_call(q, DenseKV(k, v), mask=Mask(window=change.get("window")), wants_lse=False)
    found = fa3.refusal(call.with_(training=change.get("training", False)))
    assert found == (reason and f"this build of it (fa3_fwd) {reason}")


def test_a_build_without_a_head_dim(monkeypatch):
    peers.pretend_installed(monkeypatch)
    flags = {"FLASHATTENTION_DISABLE_HDIM256": True, "FLASHATTENTION_DISABLE_HDIM96": True}
    config = SimpleNamespace(CONFIG={"build_flags": flags})
    monkeypatch.setattr(installed, "_tried", (peers.MODULES | {"flash_attn_config": config}).get)
    for dim, served in ((256, False), (96, True), (192, True)):
        q, k, v = qkv(dim=dim, dtype=torch.bfloat16)
        reason = fa3.refusal(make_call(q, DenseKV(k, v), mask=Mask()))
        assert (reason is None) == served, reason


def test_an_older_flash_attn(fakes, monkeypatch):
    old = SimpleNamespace(flash_attn_func=lambda q, k, v, dropout_p=0.0: None)
    monkeypatch.setattr(installed, "_tried", lambda module: old)
    q, k, v = qkv(dim=64, dtype=torch.float16)
    reason = flash_attn.refusal(make_call(q, DenseKV(k, v), mask=Mask()))
    assert reason == "it needs flash-attn 2.6 or newer"


def test_pages_of_256_slots_stay_where_they_are(fakes):
    pool = [normal(4, 2, 256, 64, dtype=torch.float16) for _ in "kv"]
    table, lens = torch.tensor([[2, 0], [1, 3]]).int(), torch.tensor([300, 5]).int()
    q = normal(2, 4, 1, 64, dtype=torch.float16)
    found = []
    for dtype, backend in ((torch.float16, "flash_attn"), (torch.float64, "reference")):
        kv = PagedKV(*(x.to(dtype) for x in pool), table, lens, 300)
        found.append(attend(make_call(q.to(dtype), kv, mask=Mask()), backend=backend))
    assert largest_error(found[0].out, found[1].out) <= NEAR
    assert_lse(found[0].lse, found[1].lse.float(), 1e-3)


def latent(q_len, k_len, device="cpu", dim=576):
    """Queries, keys and values of absorbed MLA: values are the first 512 channels of keys."""
    q, k, _ = qkv(8, 1, q_len, k_len, dim, dtype=torch.bfloat16, device=device)
    return q, k, k[..., :512]


def check_latent(tensors):
    """fa3 gives what the reference gives, and refuses values of memory of their own."""
    q, k, v = tensors
    for _ in range(2):  # the second call is of a known signature
        ours = attention(q, k, v, scale=192**-0.5, return_lse=True, backend="fa3")
    truth = attention(
        *(x.double().cpu() for x in tensors), scale=192**-0.5, return_lse=True, backend="reference"
    )
    assert largest_error(ours.out, truth.out) <= NEAR
    assert_lse(ours.lse, truth.lse, 1e-3)
    apart = torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device=v.device).copy_(v)
    with pytest.raises(Unsupported, match="head_dim 576 is not a multiple of 8 up to 256"):
        attention(q, k, apart, scale=192**-0.5, return_lse=True, backend="fa3")


@pytest.mark.parametrize("q_len", [1, 5])
def test_values_that_are_channels_of_keys(q_len, fakes):
    check_latent(latent(q_len, 70))
    with pytest.raises(Unsupported, match="no gradients, softcap and windows"):
        attention(*latent(q_len, 70), softcap=9.0, backend="fa3")
    q, k, _ = latent(1, 70)
    with pytest.raises(Unsupported, match="is not a multiple of 8 up to 256"):
        attention(q, k, k[..., 64:], backend="fa3")


def test_rows_that_see_nothing(fakes):
    q, k, v = qkv(q_len=5, k_len=3, dim=64, dtype=torch.bfloat16)
    for name in ("fa3", "fa4", "flash_attn"):
        out, lse = attention(q, k, v, return_lse=True, backend=name)
        assert (out[:, :, :2] == 0).all() and lse[:, :, :2].isneginf().all()
        assert lse[:, :, 2:].isfinite().all()


def test_tensors_at_any_strides(fakes):
    """The fakes refuse what TMA cannot load, so adapters copy it."""
    q, k, v = qkv(q_len=33, k_len=33, dim=64, dtype=torch.bfloat16)
    expected = attention(q, k, v, backend="tiled")
    by_token = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    by_channel = [x.mT.contiguous().mT for x in (q, k, v)]
    wide = [torch.cat((x, x[..., :3]), -1)[..., :64] for x in (q, k, v)]
    shared = [q, k[:, :1].expand_as(k), v[:, :1].expand_as(v)]
    one_head = attention(*shared, backend="tiled")
    for name in ("fa3", "fa4", "flash_attn"):
        for tensors in (by_token, by_channel, wide):
            assert largest_error(attention(*tensors, backend=name), expected) <= NEAR
        assert largest_error(attention(*shared, backend=name), one_head) <= NEAR


def test_gradients_cannot_be_differentiated_again(fakes):
    leaves = [x.requires_grad_() for x in qkv(dim=64, dtype=torch.bfloat16)]
    for name in ("fa3", "fa4", "flash_attn"):
        out = attention(*leaves, backend=name)
        (dq,) = torch.autograd.grad(out.sum(), leaves[0], create_graph=True)
        with pytest.raises(Unsupported, match="cannot be differentiated again"):
            dq.sum().backward()


def test_a_measured_rule_takes_a_peer_and_explain_names_it(fakes, monkeypatch):
    peer = Rule(order=("fa3", "gluon"), **WINS)
    ours = Rule(order=("tiled",), why="simple", source="another_record")
    monkeypatch.setattr(rules, "rules_for", lambda device: RuleSet([ours, peer]))
    monkeypatch.setattr(rules, "may_decide", lambda call: True)
    q, k, v = qkv(dim=64, dtype=torch.bfloat16)
    lines = explain(q, k, v)
    assert lines[0] == ("fa3", "chosen: 1.1 times Gluon's speed (some_record)")
    assert dict(lines)["fa4"] == "supported, but no measurement of this machine puts it first"
    call = make_call(q, DenseKV(k, v), mask=Mask())
    assert dispatch.choose(call, "auto") is fa3
    assert dispatch.forward(call, "auto").out.is_contiguous()
    # What the peer cannot run follows the next rule, and is not told of the peer's speed.
    q, k, v = (x.float() for x in (q, k, v))
    assert dict(explain(q, k, v))["tiled"] == "chosen: simple (another_record)"


def test_not_by_name_inside_torch_compile(fakes, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    q, k, v = qkv(dim=64, dtype=torch.bfloat16)
    call = make_call(q, DenseKV(k, v), mask=Mask())
    for name in PEERS:
        assert dispatch.load(name).refusal(call) == "it has no torch.compile registration"


HERE = {name: where_it_runs(name) for name in PEERS}


def with_marks(pairs):
    """Each (backend, x) with the mark of the backend."""
    return [pytest.param(name, x, marks=HERE[name].marks) for name, x in pairs]


class TestOnGPU:
    pytestmark = on_gpu

    @pytest.mark.parametrize(("name", "cell"), with_marks((c.backend, c) for c in CELLS), ids=str)
    def test_the_cells_of_the_matrix(self, name, cell):
        torch.manual_seed(1)
        given = matrix.on_cuda(matrix.call_of(cell))
        reason = dispatch.refusal(make_call(given.q, given.kv, **given.options), name)
        if reason is not None:
            assert "this build of it" in reason
            return
        check_cell(cell, given)

    @pytest.mark.parametrize(("name", "case"), with_marks(cases()), ids=str)
    def test_masks_and_lengths(self, name, case):
        check_or_refused(name, case, "cuda")

    @pytest.mark.parametrize("name", HERE.values())
    @pytest.mark.parametrize(
        "shape", [(1, 8192, 128), (300, 4096, 128), (2048, 2048, 256)], ids=str
    )
    def test_larger_ones_and_a_captured_graph(self, name, shape):
        q_len, k_len, dim = shape
        q, k, v = (normal(1, h, n, dim, dtype=torch.bfloat16, device="cuda")
                   for h, n in ((8, q_len), (2, k_len), (2, k_len)))  # fmt: skip
        attention(q, k, v, backend=name)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = attention(q, k, v, backend=name)
        q.copy_(q.flip(1))
        graph.replay()
        truth = attention(q.double(), k.double(), v.double(), backend="tiled")
        assert largest_error(out, truth) <= NEAR

    @pytest.mark.parametrize("name", [HERE["fa3"]])
    @pytest.mark.parametrize("lengths", [(1, 4097), (5, 300), (200, 200)], ids=str)
    def test_values_that_are_channels_of_keys(self, name, lengths):
        check_latent(latent(*lengths, device="cuda"))

    @pytest.mark.parametrize("name", HERE.values())
    def test_rows_that_see_nothing(self, name):
        q, k, v = qkv(q_len=300, k_len=130, dim=64, dtype=torch.bfloat16, device="cuda")
        if dispatch.refusal(make_call(q, DenseKV(k, v), mask=Mask()), name) is None:
            out, lse = attention(q, k, v, return_lse=True, backend=name)
            assert (out[:, :, :170] == 0).all() and lse[:, :, :170].isneginf().all()
            assert lse[:, :, 170:].isfinite().all()
