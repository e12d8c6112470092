"""The Gluon prefill kernel: the backends' contract on a Hopper GPU; elsewhere, that it compiles."""

import os
import warnings
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Gluon has no interpreter", allow_module_level=True)

from saccade.core import BlockSelection, DenseKV, Mask, PagedKV, Unsupported
from saccade.ops import attend, attention, explain
from saccade.ops.attention.api import make_call
from tests.support.cases import MASKS, Case, on
from tests.support.gpu import on_gpu
from tests.support.reference import check_case

SMALL_BLOCKS = BlockSelection(allowed=torch.ones(1, 1, 1, 1).bool(), q_block=64, k_block=64)
VARLEN_MASKS = [{}, {"causal": False}, {"window": 200, "sinks": 3}]
TILES = (64, 128, 256)  # head dimensions that fill a tile
LENGTHS = [(33, 33), (1, 70), (65, 130), (300, 300), (200, 1000), (513, 700)]


def check(case, dtype):
    check_case(case, "gluon", dtype, "cuda")


def check_blocks(block, lengths, mask, dim):
    torch.manual_seed(1)
    allowed = torch.rand(2, 2, -(-lengths[0] // block), -(-lengths[1] // block)) < 0.33
    blocks = BlockSelection(allowed=allowed, q_block=block, k_block=block)
    case = Case((8, 2), lengths, mask, "plain", head_dim=dim, options={"blocks": blocks})
    check(case, torch.bfloat16)


class TestOnGPU:
    pytestmark = on_gpu

    @pytest.mark.parametrize("dim", TILES)
    @pytest.mark.parametrize("lengths", LENGTHS, ids=str)
    @pytest.mark.parametrize("mask", [*MASKS, {"window": 130, "sinks": 140}], ids=str)
    def test_equals_the_reference(self, mask, lengths, dim):
        check(Case((6, 2), lengths, mask, "plain", head_dim=dim), torch.bfloat16)

    @pytest.mark.parametrize("dim", [40, 80, 96, 112, 160, 192, 200])
    @pytest.mark.parametrize("mask", [{}, {"causal": False}, {"window": 130, "sinks": 3}], ids=str)
    def test_heads_that_do_not_fill_a_tile(self, mask, dim):
        for lengths in ((300, 300), (65, 700)):
            check(Case((6, 2), lengths, mask, "plain", head_dim=dim), torch.bfloat16)

    @pytest.mark.parametrize("dims", [(192, 128), (128, 64), (96, 40), (256, 200)], ids=str)
    @pytest.mark.parametrize("token_major", [False, True])
    def test_values_narrower_than_keys(self, dims, token_major):
        """The output has the layout of the queries, whose rows of tokens a model reads."""
        q, k = (
            torch.randn(2, n, heads, dims[0], device="cuda") for n, heads in ((300, 6), (700, 2))
        )
        v = torch.randn(2, 700, 2, dims[1], device="cuda")
        q, k, v = (x.bfloat16().transpose(1, 2) for x in (q, k, v))
        q = q if token_major else q.contiguous()
        truth = attention(q.double(), k.double(), v.double(), backend="reference")
        ours = attention(q, k, v, backend="gluon")
        assert (ours - truth).abs().max() < 2.5e-2
        assert (ours.transpose(1, 2) if token_major else ours).is_contiguous()

    def test_scores_that_grow_from_tile_to_tile(self):
        """The maximum that weights refer to follows late, and in some rows of a warp only."""
        q, k, v = (torch.randn(1, 2, 1024, 128, device="cuda") for _ in range(3))
        k *= torch.linspace(0.1, 8, 1024, device="cuda").flip(0)[:, None]
        q[:, :, ::7] *= 4
        q, k, v = (x.bfloat16() for x in (q, k, v))
        for mask in ({}, {"causal": False}):
            truth = attend(
                make_call(q.double(), DenseKV(k.double(), v.double()), mask=Mask(**mask)),
                backend="reference",
            )
            ours = attend(make_call(q, DenseKV(k, v), mask=Mask(**mask)), backend="gluon")
            assert (ours.out - truth.out).abs().max() < 3e-2
            assert (ours.lse - truth.lse).abs().max() < 1e-2

    @pytest.mark.parametrize("dim", [*TILES, 96])
    @pytest.mark.parametrize("heads", [(4, 4), (5, 1), (6, 2), (8, 1)], ids=str)
    @pytest.mark.parametrize(
        "mask", [{}, {"causal": False}, {"window": 1300, "sinks": 3}, {"window": 90}], ids=str
    )
    def test_few_queries_over_many_keys(self, mask, heads, dim):
        """Heads share tiles, and the keys are divided, where a split may see no key at all."""
        for queries in (17, 70, 200):
            case = Case(heads, (queries, 4100), mask, "plain", head_dim=dim, batch=2)
            check(case, torch.bfloat16)

    @pytest.mark.parametrize("dim", TILES)
    @pytest.mark.parametrize("mask", VARLEN_MASKS, ids=str)
    def test_few_queries_over_key_lengths_per_row(self, mask, dim):
        check(Case((8, 2), (40, 4100), mask, "lengths", head_dim=dim, batch=3), torch.bfloat16)

    @pytest.mark.parametrize("heads", [(4, 4), (5, 1), (8, 2)], ids=str)
    @pytest.mark.parametrize("mask", [{}, {"window": 200, "sinks": 3}], ids=str)
    def test_sink_logits_in_float16(self, heads, mask):
        check(Case(heads, (300, 400), mask, "sink_logits", head_dim=64), torch.float16)

    @pytest.mark.parametrize("dim", TILES)
    @pytest.mark.parametrize("lengths", [(300, 300), (513, 700), (128, 1024)], ids=str)
    @pytest.mark.parametrize(
        "mask", [{}, {"causal": False}, {"window": 300}, {"window": 300, "sinks": 5}], ids=str
    )
    def test_selected_blocks(self, mask, lengths, dim):
        """A third of the blocks; some rows attend to nothing at all."""
        check_blocks(128, lengths, mask, dim)

    @pytest.mark.parametrize("dim", TILES)
    @pytest.mark.parametrize("block", [64, 32])
    @pytest.mark.parametrize("lengths", [(300, 300), (513, 700), (128, 1024)], ids=str)
    @pytest.mark.parametrize("causal", [True, False])
    def test_selected_blocks_smaller_than_tiles(self, causal, lengths, block, dim):
        """Heads share tiles of queries, and blocks lie side by side in tiles of keys."""
        check_blocks(block, lengths, {"causal": causal}, dim)

    @pytest.mark.parametrize("dim", TILES)
    @pytest.mark.parametrize("mask", VARLEN_MASKS, ids=str)
    def test_packed_sequences(self, mask, dim):
        """Sequences without queries, without keys, with fewer keys than queries, of many tiles."""
        q_lens, k_lens = [300, 0, 1, 77, 513, 20, 128, 30], [300, 3, 70, 77, 700, 0, 128, 5]
        cu = tuple(torch.tensor([0, *n]).cumsum(0) for n in (q_lens, k_lens))
        lengths = (sum(q_lens), sum(k_lens))
        case = Case((6, 2), lengths, mask, "plain", head_dim=dim, batch=1)
        case = replace(case, options={"cu_seqlens": cu})
        check(case, torch.bfloat16)

    @pytest.mark.parametrize("dim", TILES)
    @pytest.mark.parametrize("mask", VARLEN_MASKS, ids=str)
    def test_key_lengths_per_row(self, mask, dim):
        """Keys past the end of a row are NaN."""
        check(Case((6, 2), (200, 720), mask, "lengths", head_dim=dim, batch=3), torch.bfloat16)

    @pytest.mark.parametrize("longest", [700, 2700])
    @pytest.mark.parametrize("page", [16, 64, 128, 256])
    @pytest.mark.parametrize("dim", TILES)
    @pytest.mark.parametrize("mask", [Mask(), Mask(window=200, sinks=3)], ids=str)
    def test_pages_in_any_order(self, mask, dim, page, longest):
        """Slots past the end of a row hold NaN, and its page table invalid page numbers.

        Over 2700 keys the keys are divided into splits.
        """
        ends = torch.tensor([longest, 200, 333], device="cuda")
        count = -(-longest // page)
        q = torch.randn(3, 6, 200, dim, device="cuda", dtype=torch.bfloat16)
        shape = (3 * count, 2, page, dim)
        pools = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
        page_table = torch.randperm(3 * count, device="cuda").view(3, count).int()
        k, v = (
            x[page_table.long()].transpose(1, 2).reshape(3, 2, count * page, dim).double()
            for x in pools
        )
        truth = attend(
            make_call(q.double(), DenseKV(k, v), mask=mask, kv_lens=ends), backend="reference"
        )  # fmt: skip
        slot = torch.arange(count * page, device="cuda").view(count, page)
        for x in pools:
            for row in range(3):
                past = (slot >= ends[row])[:, None, :, None]
                pages = page_table[row].long()
                x[pages] = x[pages].masked_fill(past, torch.nan)
        page_table[slot[None, :, 0] >= ends[:, None]] = 10**6
        view = PagedKV(*pools, page_table, ends.int(), longest)
        ours = attend(make_call(q, view, mask=mask), backend="gluon")
        assert (ours.out - truth.out).abs().max() < 2.5e-2
        assert (ours.lse - truth.lse).abs().max() < 1e-3

    @pytest.mark.parametrize("dim", TILES)
    @pytest.mark.parametrize("mask", VARLEN_MASKS, ids=str)
    def test_many_work_tiles_per_cta(self, mask, dim):
        """Six work tiles per CTA: the state of one must not leak into the next."""
        q, k, v = (torch.randn(1, heads, 1536, dim, device="cuda") for heads in (64, 2, 2))
        q, k, v = (x.bfloat16() for x in (q, k, v))
        wide = [x.double() for x in (q, k, v)]
        truth = attention(*wide, **mask, backend="reference")
        ours = attention(q, k, v, **mask, backend="gluon")
        assert (ours - truth).abs().max() < 2.5e-2
        token_major = attention(q.transpose(1, 2).contiguous().transpose(1, 2), k, v, **mask)
        assert token_major.transpose(1, 2).is_contiguous()
        assert (token_major - truth).abs().max() < 2.5e-2

    def test_pages_with_one_query_offset_for_all_rows(self):
        """As a paged cache calls it: the offset is on the host, the lengths on the device."""
        ends = torch.tensor([700, 650], device="cuda")
        q, k, v = (
            torch.randn(2, h, n, 64, device="cuda").bfloat16()
            for h, n in ((6, 200), (2, 704), (2, 704))
        )
        pools = [x.view(2, 2, 44, 16, 64).transpose(1, 2).flatten(0, 1) for x in (k, v)]
        table = torch.arange(88, device="cuda", dtype=torch.int32).view(2, 44)
        truth = attend(
            make_call(
                q.double(), DenseKV(k.double(), v.double()), mask=Mask(), kv_lens=ends, q_offset=500
            ),
            backend="reference",
        )
        view = PagedKV(*pools, table, ends.int(), 700)
        ours = attend(make_call(q, view, mask=Mask(), q_offset=500), backend="gluon")
        assert (ours.out - truth.out).abs().max() < 2.5e-2
        assert (ours.lse - truth.lse).abs().max() < 1e-3

    def test_cu_seqlens_are_copied_to_the_host_once_and_read_anew_by_graphs(self):
        """The second call does not synchronize; a graph reads cu_seqlens in every replay."""
        q, k, v = (torch.randn(1, h, 512, 64, device="cuda").bfloat16() for h in (6, 2, 2))
        cu = torch.tensor([0, 100, 512], device="cuda", dtype=torch.int32)

        def run():
            return attention(q, k, v, cu_seqlens=cu, backend="gluon")

        once = run()
        try:
            with warnings.catch_warnings(action="ignore"):  # that the mode is a prototype
                torch.cuda.set_sync_debug_mode("error")
            again = run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(once, again)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run()
        graph.replay()
        assert torch.equal(once, captured)
        cu[1] = 300
        graph.replay()
        assert torch.equal(run(), captured) and not torch.equal(once, captured)

    @pytest.mark.parametrize("offset", [-50, 5, 300])
    @pytest.mark.parametrize("mask", [Mask(), Mask(window=40), Mask(causal=False)], ids=str)
    def test_queries_before_or_past_the_keys(self, mask, offset):
        q, k, v = (torch.randn(1, 4, n, 64) for n in (100, 200, 200))
        call = {"mask": mask, "q_offset": offset}
        truth = attend(
            make_call(*(q.double(), DenseKV(k.double(), v.double())), **call), backend="reference"
        )
        moved = on("cuda", *(x.bfloat16() for x in (q, k, v)))
        ours = attend(make_call(moved[0], DenseKV(*moved[1:]), **call), backend="gluon")
        assert (ours.out.cpu() - truth.out).abs().max() < 3e-2
        assert torch.equal(ours.lse.cpu().isneginf(), truth.lse.isneginf())

    def test_strided_tensors(self):
        base = torch.randn(2, 300, 8, 128, device="cuda", dtype=torch.bfloat16)
        q, k, v = (base.transpose(1, 2)[:, part] for part in (slice(0, 4), [4, 5], slice(6, 8)))
        truth = attention(*(x.double() for x in (q, k, v)), backend="reference")
        ours = attention(q, k, v, backend="gluon")
        assert (ours - truth).abs().max() < 2e-2

    def test_two_runs_give_the_same_bits(self):
        q, k, v = (torch.randn(1, h, 3000, 64, device="cuda").half() for h in (16, 4, 4))
        truth = attention(*(x.float() for x in (q, k, v)), backend="reference")
        first, second = (attention(q, k, v, backend="gluon") for _ in range(2))
        assert torch.equal(first, second)
        assert (first - truth).abs().max() < 5e-3

    def test_inside_a_cuda_graph(self):
        q, k, v = (torch.randn(1, h, 500, 128, device="cuda").bfloat16() for h in (4, 2, 2))
        attention(q, k, v, backend="gluon")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = attention(q, k, v, backend="gluon")
        q.copy_(q.flip(2))
        graph.replay()
        assert torch.equal(out, attention(q, k, v, backend="gluon"))

    def test_more_than_two_to_the_31_elements(self):
        length = 2**31 // (128 * 16) + 4096
        k = torch.empty(1, 16, length, 128, device="cuda", dtype=torch.bfloat16).normal_()
        q = torch.randn(1, 16, 200, 128, device="cuda", dtype=torch.bfloat16)
        ours = attention(q, k, k, window=256, backend="gluon")[:, 15:]
        part = k[:, 15:, -456:]
        truth = attention(q[:, 15:], part, part, window=256, backend="reference")
        assert torch.allclose(ours, truth, atol=2e-2)

    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            ({"key_padding": torch.ones(1, 40).bool()}, "no key_padding"),
            ({"scale": -1.0}, "scale must be positive"),
            (
                {"blocks": SMALL_BLOCKS},
                "do not fill its tiles",
            ),
        ],
        ids=["padding", "scale", "blocks"],
    )
    def test_refuses_in_a_sentence(self, options, reason):
        x = torch.randn(1, 2, 40, 64, device="cuda", dtype=torch.bfloat16)
        with pytest.raises(Unsupported, match=reason):
            attention(x, x, x, **on("cuda", options), backend="gluon")

    def test_refuses_other_head_dims_dtypes_and_alignments(self):
        x = torch.randn(1, 2, 40, 264, device="cuda", dtype=torch.bfloat16)
        for wrong, reason in (
            (x, "head_dim 264 is not one of 33 to 256"),
            (x[..., :60], "head_dim 60 is no multiple of 8"),
            (x[..., :64].float(), "float32 is not one of bfloat16, float16"),
            (torch.randn(1, 2, 40, 65, device="cuda").half()[..., 1:], "multiples of 16 bytes"),
        ):
            with pytest.raises(Unsupported, match=reason):
                attention(wrong, wrong, wrong, backend="gluon")

    def test_refuses_pages_that_do_not_fit_its_tiles(self):
        q = torch.randn(1, 2, 40, 64, device="cuda", dtype=torch.bfloat16)
        page_table, ends = (
            torch.zeros(1, 8, device="cuda").int(),
            torch.tensor([40], device="cuda").int(),
        )
        for size, reason in ((8, "shorter than 16"), (48, "neither divide its tiles of 128")):
            pool = torch.randn(8, 2, size, 64, device="cuda", dtype=torch.bfloat16)
            with pytest.raises(Unsupported, match=reason):
                attend(
                    make_call(q, PagedKV(pool, pool, page_table, ends, 40), mask=Mask()),
                    backend="gluon",
                )


def test_packed_sequences_become_query_tiles_with_the_longest_last():
    from saccade.ops.attention.nvidia.gluon.prefill.seqlen_info import varlen_q_tiles
    from saccade.ops.attention.nvidia.problem import dense_problem

    q_lens, k_lens = [200, 0, 1, 77], [300, 5, 70, 0]
    cu = tuple(torch.tensor([0, *n]).cumsum(0) for n in (q_lens, k_lens))
    q, k = torch.empty(1, 2, 278, 64), torch.empty(1, 2, 375, 64)
    call = make_call(q, DenseKV(k, k), mask=Mask(), cu_seqlens=cu)
    found = varlen_q_tiles(dense_problem(call), 128)[:, :5].tolist()
    # Three surplus tiles, the sequence without keys, that of one query, two tiles of the first.
    assert [row[1] for row in found[:3]] == [0, 0, 0]
    assert found[3:] == [
        [201, 77, 375, 0, 0], [200, 1, 305, 70, 0], [0, 200, 0, 300, 0], [0, 200, 0, 300, 1],
    ]  # fmt: skip


def test_the_table_of_query_tiles_is_made_once_for_all_layers():
    from saccade.ops.attention.nvidia.gluon.prefill.seqlen_info import varlen_q_tiles
    from saccade.ops.attention.nvidia.problem import dense_problem

    q, cu = torch.empty(1, 2, 278, 64), torch.tensor([0, 200, 278])
    problem = dense_problem(make_call(q, DenseKV(q, q), mask=Mask(), cu_seqlens=cu))
    once = varlen_q_tiles(problem, 128)
    assert varlen_q_tiles(problem, 128) is once and varlen_q_tiles(problem, 64) is not once
    cu[1] = 100
    assert not torch.equal(varlen_q_tiles(problem, 128), once)


def test_refuses_cpu_tensors_in_a_sentence():
    x = torch.randn(1, 1, 4, 64, dtype=torch.bfloat16)
    with pytest.raises(Unsupported, match="tensors are on cpu, not on an NVIDIA GPU"):
        attention(x, x, x, backend="gluon")
    assert dict(explain(x, x, x))["gluon"].startswith("cannot: tensors are on cpu")
