"""Scores of a text against transformers in float64, one pass and in windows."""

import copy

import pytest
import torch

import saccade
from saccade.core import BadInput
from saccade.runtime import ContextParams
from saccade.runtime.text_scores import SCORES, TextScorer
from tests.tiny_models import tiny_config, tiny_model

TOKENS = torch.arange(3, 103) * 7 % 120 + 3
QUESTION, BEFORE = torch.tensor([9, 40, 77]), torch.tensor([1])
ASKED = {"self_information": TOKENS[:0], "contrastive": QUESTION, "received_attention": QUESTION}


@pytest.fixture(scope="module")
def model():
    return tiny_model(tiny_config("llama"))


@pytest.fixture(scope="module")
def exact(model):
    """The model in float64, whose attention gives its weights."""
    made = copy.deepcopy(model).double()
    made.set_attn_implementation("eager")
    return made


def surprise(exact, tokens, before):
    whole = torch.cat((before, tokens))
    logs = exact(whole[None]).logits[0].log_softmax(-1)
    return -logs[:-1].gather(1, whole[1:, None])[-len(tokens) :, 0]


def weights(exact, tokens, queries_from):
    """Mean attention of the queries from there on to each token, summed over layers and heads."""
    found = exact(tokens[None], output_attentions=True).attentions
    total = torch.stack([w[0].sum(0) for w in found]).sum(0)[queries_from:]
    reach = torch.ones(len(tokens), len(tokens)).tril()[queries_from:].sum(0).clamp_min(1)
    return total.sum(0) / reach


@torch.no_grad()
def expected(exact, kind, tokens, question, before):
    if kind == "self_information":
        return surprise(exact, tokens, before)
    if kind == "contrastive":
        asked = torch.cat((before, question))
        return surprise(exact, tokens, before) - surprise(exact, tokens, asked)
    whole = torch.cat((before, tokens, question))
    first = len(before) + len(tokens) if len(question) else 0
    return weights(exact, whole, first)[len(before) : len(before) + len(tokens)]


def scored(model, kind, question, **options):
    with saccade.Context(model, ContextParams(n_batch=16)) as ctx:
        return TextScorer(kind, question, BEFORE, **options).scores(ctx, TOKENS)


def close(ours, right):
    scale = max(1.0, right.abs().max().item())
    return (ours.double() - right).abs().max() < 1e-5 * scale


@pytest.mark.parametrize("kind", SCORES)
def test_one_pass(model, exact, kind):
    found = scored(model, kind, ASKED[kind])
    assert found.windows == 1
    assert close(found.scores, expected(exact, kind, TOKENS, ASKED[kind], BEFORE))
    assert torch.equal(scored(model, kind, ASKED[kind], window=100, overlap=9).scores, found.scores)


def test_attention_of_all_queries(model, exact):
    found = scored(model, "received_attention", TOKENS[:0]).scores
    assert close(found, expected(exact, "received_attention", TOKENS, TOKENS[:0], BEFORE))


@pytest.mark.parametrize("kind", SCORES)
def test_windows(model, exact, kind):
    """100 tokens in windows of 40 that share 10: 0-40, 30-70, 60-100."""
    found = scored(model, kind, ASKED[kind], window=40, overlap=10)
    parts = [expected(exact, kind, TOKENS[a : a + 40], ASKED[kind], BEFORE) for a in (0, 30, 60)]
    first = 35 if kind == "received_attention" else 40  # where the second window's scores begin
    right = torch.cat((parts[0][:first], parts[1][first - 30 : first], parts[2][first - 30 :]))
    assert found.windows == 3 and close(found.scores, right)
    assert (
        found.read == {"self_information": 123, "contrastive": 255, "received_attention": 132}[kind]
    )


@pytest.mark.parametrize("kind", ["self_information", "received_attention"])
@pytest.mark.parametrize("length", [2, 39, 40, 41, 69, 70, 71, 400])
def test_windows_own_every_token_once(kind, length):
    parts = TextScorer(kind, window=40, overlap=10).windows(length, 512)
    assert [i for p in parts for i in range(p.first, p.last)] == list(range(length))
    assert all(p.start <= p.first < p.last <= p.stop for p in parts)
    assert all(p.stop - p.start == min(40, length) for p in parts)
    assert all(p.first - p.start >= 5 for p in parts[1:])


def test_progress_counts_both_readings_of_all_windows(model):
    seen = []
    with saccade.Context(model, ContextParams(n_batch=16)) as ctx:
        scorer = TextScorer("contrastive", QUESTION, BEFORE, window=40, overlap=10)
        found = scorer.scores(ctx, TOKENS, on_progress=lambda *at: seen.append(at))
    assert seen[-1] == (found.read, found.read) and seen == sorted(set(seen))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kind": "other"}, "score='other': expected one of self_information, contrastive"),
        ({"kind": "contrastive"}, "give a question"),
        ({"kind": "self_information", "question": QUESTION}, "does not look at a question"),
        ({"kind": "self_information", "window": 513}, "window=513: expected 2 to 512 tokens"),
        ({"kind": "self_information", "window": 9, "overlap": 9}, "overlap=9: expected 1 to 8"),
        ({"kind": "contrastive", "question": TOKENS.repeat(6)}, "600 tokens leaves no room"),
    ],
)
def test_bad_input(options, said):
    with pytest.raises(BadInput, match=said):
        TextScorer(**options).windows(1000, 512)
