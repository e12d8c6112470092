"""bert_padding: what is taken out and put back, token by token."""

import torch

from saccade.flash_attn_interface.bert_padding import (
    index_first_axis,
    index_put_first_axis,
    pad_input,
    unpad_input,
    unpad_input_for_concatenated_sequences,
)
from tests.support.random_inputs import normal

MASK = torch.tensor([[1, 1, 0, 0], [0, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]])


def test_real_tokens_are_taken_out_and_put_back():
    x = normal(4, 4, 2, 3)
    for mask in (MASK, MASK.bool()):
        tokens, indices, cu_seqlens, longest, used = unpad_input(x, mask)
        assert indices.tolist() == [0, 1, 5, 7, 12, 13, 14, 15]
        assert torch.equal(tokens, torch.stack([x[i // 4, i % 4] for i in indices]))
        assert cu_seqlens.tolist() == [0, 2, 4, 4, 8] and cu_seqlens.dtype == torch.int32
        assert longest == 4 and used.tolist() == [2, 2, 0, 4]
        assert torch.equal(pad_input(tokens, indices, 4, 4), x * MASK[..., None, None])


def test_unused_tokens_have_a_place():
    unused = torch.tensor([[0, 0, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]])
    _, indices, cu_seqlens, longest, used = unpad_input(normal(4, 4, 2), MASK, unused)
    assert indices.tolist() == [0, 1, 2, 5, 7, 8, 12, 13, 14, 15]
    assert cu_seqlens.tolist() == [0, 3, 5, 6, 10]
    assert longest == 4 and used.tolist() == [2, 2, 0, 4]


def test_several_sequences_in_a_row():
    x = normal(3, 6, 2)
    lengths = torch.tensor([[2, 3, 0, 0, 0, 0], [3, 1, 0, 0, 0, 0], [6, 0, 0, 0, 0, 0]])
    tokens, indices, cu_seqlens, longest = unpad_input_for_concatenated_sequences(x, lengths)
    assert indices.tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 9, *range(12, 18)]
    assert torch.equal(tokens, x.view(18, 2)[indices])
    assert cu_seqlens.tolist() == [0, 2, 5, 8, 9, 15] and longest == 6


def test_gradients_go_to_real_tokens_alone():
    x = normal(4, 4, 2).requires_grad_()
    tokens, indices, *_ = unpad_input(x, MASK)
    weights = normal(4, 4, 2)
    (pad_input(tokens, indices, 4, 4) * weights).sum().backward()
    assert torch.equal(x.grad, weights * MASK[..., None])


def test_rows_by_index():
    x, indices = normal(5, 2, 3), torch.tensor([4, 0, 2])
    taken = index_first_axis(x, indices)
    assert torch.equal(taken, torch.stack([x[4], x[0], x[2]]))
    put = index_put_first_axis(taken, indices, 5)
    assert torch.equal(put, x * torch.tensor([1, 0, 1, 0, 1])[:, None, None])
