"""The contract of backends: all agree with the float64 reference, whatever the call.

What a backend does not compute is said by the support matrix, and no case here is passed over.
"""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from saccade.core import Unsupported
from saccade.ops import attention
from saccade.ops.attention.dispatch import AUTO_ORDER, BACKENDS
from tests.support import matrix
from tests.support.cases import EXTRAS, HERE, Case, all_cases
from tests.support.random_inputs import qkv
from tests.support.reference import check_case
from tests.support.tolerance import largest_error

OTHERS = [name for name in HERE if name != "reference"]
ROW_OF_EXTRA = {"padding": "key_padding", "lengths": "kv_lens", "alibi": "alibi_slopes"}
ROW_OF_EXTRA |= {"packed": "cu_seqlens", "plain": "causal"}


def supports(backend: str, extra: str) -> bool:
    """Whether the matrix says that a backend computes prompts with this extra."""
    return "P" in matrix.ROWS[ROW_OF_EXTRA.get(extra, extra)][backend]


SUPPORTED = [(name, case) for name in OTHERS for case in all_cases() if supports(name, case.extra)]


@pytest.mark.parametrize(("backend", "case"), SUPPORTED, ids=str)
def test_equals_the_reference(backend, case):
    check_case(case, backend)


def test_only_softcap_is_passed_over():
    """As the matrix says; a case of anything else runs on every backend of this machine."""
    missing = {(name, extra) for name in OTHERS for extra in EXTRAS if not supports(name, extra)}
    assert missing == {("sdpa", "softcap")}


@pytest.mark.parametrize("backend", OTHERS)
@settings(max_examples=40, deadline=None)
@given(
    group=st.sampled_from([1, 2, 3, 5, 8]),
    kv_heads=st.integers(1, 3),
    q_len=st.integers(1, 40),
    k_len=st.integers(1, 90),
    window=st.one_of(st.none(), st.integers(1, 60)),
    sinks=st.integers(0, 5),
    extra=st.sampled_from(EXTRAS),
    head_dim=st.sampled_from([16, 24, 64]),
    seed=st.integers(0, 99),
)
def test_any_shape(backend, group, kv_heads, q_len, k_len, window, sinks, extra, head_dim, seed):
    assume(supports(backend, extra))
    mask = {} if window is None else {"window": window, "sinks": sinks}
    heads = (group * kv_heads, kv_heads)
    check_case(Case(heads, (q_len, k_len), mask, extra, head_dim=head_dim, seed=seed), backend)


@pytest.mark.parametrize("backend", OTHERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(backend, dtype):
    case = Case((6, 2), (65, 130), {"window": 50}, "plain", head_dim=64)
    check_case(case, backend, dtype, allowance=1e-3)


@pytest.mark.parametrize("backend", ["reference", "tiled"])
def test_unseen_keys_never_matter(backend):
    """NaN in a key that a query does not attend to does not change that query."""
    q, k, v, _ = Case((2, 1), (8, 8), {}, "plain").inputs()
    clean = attention(q, k, v, backend="reference")
    k[:, :, 5], v[:, :, 5] = torch.nan, torch.nan
    out = attention(q, k, v, backend=backend)
    assert torch.allclose(out[:, :, :5], clean[:, :, :5], atol=1e-6)
    assert out[:, :, 5:].isnan().all()


@pytest.mark.parametrize("backend", HERE)
def test_rows_that_see_nothing(backend):
    q, k, v, _ = Case((2, 1), (5, 3), {}, "plain").inputs()
    out, lse = attention(q, k, v, return_lse=True, backend=backend)
    assert (out[:, :, :2] == 0).all() and lse[:, :, :2].isneginf().all()
    assert lse[:, :, 2:].isfinite().all()


@pytest.mark.parametrize("backend", HERE)
def test_empty_queries_and_keys(backend):
    q, k, v, _ = Case((2, 1), (4, 6), {}, "plain").inputs()
    assert attention(q[:, :, :0], k, v, backend=backend).shape == (2, 2, 0, 16)
    out, lse = attention(q, k[:, :, :0], v[:, :, :0], return_lse=True, backend=backend)
    assert (out == 0).all() and lse.isneginf().all()


@pytest.mark.parametrize("backend", HERE)
def test_strided_inputs(backend):
    q, k, v, _ = Case((6, 2), (33, 33), {}, "plain").inputs()
    expected = attention(q, k, v, backend="reference")
    by_token = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert torch.allclose(attention(*by_token, backend=backend), expected, atol=1e-5)


@pytest.mark.parametrize("backend", ["tiled", "sdpa"])
@pytest.mark.parametrize("mask", [{}, {"window": 7, "sinks": 2}])
def test_gradients(backend, mask):
    case = Case((4, 2), (20, 20), mask, "plain")
    grads = []
    for name in ("reference", backend):
        inputs = [x.double().requires_grad_() for x in case.inputs()[:3]]
        attention(*inputs, **mask, backend=name).square().sum().backward()
        grads.append([x.grad for x in inputs])
    for ours, truth in zip(grads[1], grads[0], strict=True):
        assert largest_error(ours, truth) < 1e-8


def test_tiled_memory_is_linear():
    """The score matrix of one tile is the largest thing that tiled attention allocates."""
    from torch.profiler import ProfilerActivity, profile

    def peak(length):
        q = torch.randn(1, 2, length, 16)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
            attention(q, q[:, :1], q[:, :1], backend="tiled")
        return max(event.self_cpu_memory_usage for event in prof.events())

    assert peak(4096) <= 3 * peak(2048)
    assert peak(4096) < 4096 * 4096 * 2 * 4 / 8


def test_value_dim_may_differ():
    q, k, v = qkv(q_len=9, k_len=12, dim=24, value_dim=16)
    truth = attention(q, k, v, backend="reference")
    assert truth.shape == (2, 4, 9, 16)
    assert torch.allclose(attention(q, k, v), truth, atol=1e-5)
    with pytest.raises(Unsupported, match=r'backend="sdpa".*value_dim'):
        attention(q, k, v, backend="sdpa")


def test_every_auto_backend_is_a_backend():
    assert set(AUTO_ORDER) <= set(BACKENDS)
