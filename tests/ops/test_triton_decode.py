"""Decoding launches with PDL wait for their inputs: repeats, streams, CUDA graphs."""

import pytest
import torch

pytest.importorskip("triton")

from saccade.core import DenseKV, Mask
from saccade.ops import attend

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def problem(seed, length=9000, heads=(8, 2)):
    torch.manual_seed(seed)
    q = torch.randn(2, heads[0], 1, 64, device="cuda", dtype=torch.bfloat16)
    k, v = (
        torch.randn(2, heads[1], length, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2)
    )
    return q, k, v


def run(q, k, v):
    return attend(q, DenseKV(k, v), mask=Mask(), backend="triton").out


def test_a_step_reads_what_the_preceding_one_wrote():
    """Each output is the next query, and is written into the keys: no stale read may happen."""
    q, k, v = problem(0)

    def chain(synchronize):
        x, keys = q, k.clone()
        for i in range(20):
            x = run(x, keys, v)
            keys[:, :, -1 - i] = x[:, ::4, 0]
            if synchronize:
                torch.cuda.synchronize()
        return x

    assert torch.equal(chain(False), chain(True))


def test_two_streams_at_once():
    problems = [problem(seed) for seed in range(2)]
    truth = [run(*p) for p in problems]
    torch.cuda.synchronize()
    streams, found = [torch.cuda.Stream() for _ in problems], [[], []]
    for _ in range(100):
        for stream, p, results in zip(streams, problems, found, strict=True):
            with torch.cuda.stream(stream):
                results.append(run(*p))
    torch.cuda.synchronize()
    for results, expected in zip(found, truth, strict=True):
        assert all(torch.equal(out, expected) for out in results)


def test_graphs_replayed_beside_eager_launches():
    problems = [problem(seed) for seed in range(3)]
    truth = [run(*p) for p in problems]
    graphs, outs = [], []
    for p in problems[:2]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outs.append(run(*p))
        graphs.append(graph)
    streams = [torch.cuda.Stream() for _ in graphs]
    torch.cuda.synchronize()
    for _ in range(50):
        for stream, graph in zip(streams, graphs, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        assert torch.equal(run(*problems[2]), truth[2])
    torch.cuda.synchronize()
    for out, expected in zip(outs, truth, strict=False):
        assert torch.equal(out, expected)
