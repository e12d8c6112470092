"""Merging KV heads in a basis that they share, chosen from what they compute on ordinary text.

The heads of a group write what they have in common in different bases, so their mean cancels most
of it.  A model does not show the basis of its heads outside: values may be turned by any invertible
matrix that the output projection undoes, and keys by whatever commutes with their rotary positions,
a complex number for each pair of dimensions, that the queries undo (Align Attention Heads Before
Merging Them, arXiv 2412.20677, which uses rotations).  So a group's keys and values are stacked and
cut down to the directions of one head that lose least (principal components, keys weighted by the
queries that meet them and values by the output projection), and the queries and output projection
of each query head read those.  Heads that agree up to their basis lose nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.hf.convert_freedom import Freedom
from saccade.hf.heads import Heads

Basis = tuple[Tensor, Tensor]
"""(encode `[.., rank, group, n]`, decode `[.., group, n, rank]`): shared = encode @ the stacked
heads, and a head is about decode @ shared."""


@dataclass(frozen=True, slots=True)
class Moments:
    """What one layer computes on the calibration text.

    Attributes:
        keys, values: sums of products of all KV heads, `[kv_heads, D, kv_heads, D]` float64.
        queries: sums of products within each query head, `[heads, D, D]` float64.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor) -> Moments:
        """Moments of queries, keys and values `[tokens, heads, D]` before positions."""
        q, k, v = (part.double() for part in (q, k, v))
        return cls(
            torch.einsum("nhd,nhe->hde", q, q),
            torch.einsum("ngd,nhe->gdhe", k, k),
            torch.einsum("ngd,nhe->gdhe", v, v),
        )

    def __add__(self, other: Moments) -> Moments:
        """Moments of both texts together."""
        return Moments(
            self.queries + other.queries, self.keys + other.keys, self.values + other.values
        )


def shared_basis(moments: Tensor, weights: Tensor) -> Basis:
    """The n directions that lose least of a group of heads with n numbers each.

    Args:
        moments: sums of products of the stacked heads `[.., group, n, group, n]`, real or complex.
        weights: what an error of a head costs, `[.., group, n, n]`, positive semidefinite.
    """
    group, n = weights.shape[-3], weights.shape[-1]
    root, inverse = _roots(weights)
    flat = torch.einsum("...gde,...gehf,...hfc->...gdhc", root, moments, root)
    flat = flat.flatten(-2).flatten(-3, -2)
    directions = torch.linalg.eigh(flat).eigenvectors[..., -n:].unflatten(-2, (group, n))
    encode = torch.einsum("...gdr,...gde->...rge", directions.conj(), root)
    decode = torch.einsum("...gde,...ger->...gdr", inverse, directions)
    return _same_size(encode, decode, moments)


def _roots(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Square root and inverse square root; directions that cost nothing cost very little."""
    values, vectors = torch.linalg.eigh(weights)
    least = values.amax((-1, -2), keepdim=True) * 1e-7
    values = torch.maximum(values, least.clamp_min(1e-30)).sqrt()[..., None, :]
    return (vectors * values) @ vectors.mH, (vectors / values) @ vectors.mH


def _same_size(encode: Tensor, decode: Tensor, moments: Tensor) -> Basis:
    """The basis at the scale of the heads: numbers in the cache are as large as they were."""
    made = torch.einsum("...rgd,...gdhe,...rhe->...", encode, moments, encode.conj()).real
    group = moments.shape[-4]
    own = torch.einsum("...gdgd->...", moments).real / group
    scale = (own / made.clamp_min(1e-30)).sqrt()[..., None, None, None]
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return encode * scale, decode / scale


def merge(heads: Heads, moments: Moments, num_kv_heads: int, freedom: Freedom) -> Heads:
    """The layer with `num_kv_heads` KV heads, each the shared part of a group of neighbours.

    Args:
        freedom: what may be done to keys and values; where nothing may, they are averaged.
    """
    own = len(heads.k)
    group, per = own // num_kv_heads, len(heads.q) // own
    made: list[tuple[Tensor, ...]] = []
    for first in range(0, own, group):
        kv, of = slice(first, first + group), slice(first * per, (first + group) * per)
        weights = moments.queries[of].unflatten(0, (group, per)).sum(1)
        q, k = heads.q[of].double(), heads.k[kv].double()
        q, k = _merge_keys(q, k, moments.keys[kv, :, kv], weights, freedom)
        v, o = heads.v[kv].double().mean(0), None
        if freedom.values and heads.o is not None:
            v, o = _merge_values(heads.v[kv].double(), heads.o[:, of].double(),
                                 moments.values[kv, :, kv])  # fmt: skip
        made.append((q, k[None], v[None]) if o is None else (q, k[None], v[None], o))
    q, k, v, *rest = zip(*made, strict=True)
    o = torch.cat(rest[0], dim=1).to(heads.q.dtype) if rest else heads.o
    q, k, v = (torch.cat(part).to(heads.q.dtype) for part in (q, k, v))
    return Heads(q, k, v, o)


def _merge_keys(
    q: Tensor, k: Tensor, moments: Tensor, weights: Tensor, freedom: Freedom
) -> tuple[Tensor, Tensor]:
    """(queries `[heads, D, inputs]`, the key `[D, inputs]`) of one group."""
    if freedom.pairs is None:
        return q, k.mean(0)
    new_q, new_k = torch.zeros_like(q), torch.zeros_like(k[0])
    per = len(q) // len(k)
    for block in freedom.pairs.blocks():
        basis = signed_mean if freedom.only_signs else shared_basis
        encode, decode = basis(block.moments(moments), block.weights(weights))
        block.put(new_k[None], torch.einsum("frgd,gfdi->fri", encode, block.take(k))[None])
        turn = decode.repeat_interleave(per, dim=1)  # [f, heads, n, rank]
        # The score of a pair is Re(q conj(k)), and k is about decode * shared.
        block.put(new_q, torch.einsum("hfdi,fhdr->hfri", block.take(q), turn.conj()))
    return new_q, new_k


def signed_mean(moments: Tensor, weights: Tensor) -> Basis:
    """The mean of the heads, each dimension with the sign in which heads agree best.

    Normed keys allow no more: a norm keeps the sign of a dimension, and not its size.
    """
    group = weights.shape[-3]
    inside = torch.einsum("...gdhd->...dgh", moments).real
    signs = torch.linalg.eigh(inside).eigenvectors[..., -1].sign()  # [.., n, group]
    signs = torch.where(signs == 0, torch.ones_like(signs), signs).mT
    decode = torch.diag_embed(signs).to(moments.dtype)  # [.., group, n, n]
    return decode.movedim(-2, -3) / group, decode


def _merge_values(v: Tensor, o: Tensor, moments: Tensor) -> tuple[Tensor, Tensor]:
    """(the value `[D, inputs]`, output projection `[hidden, heads, D]`) of one group."""
    per = o.shape[1] // len(v)
    weights = torch.einsum("ohd,ohe->hde", o, o).unflatten(0, (-1, per)).sum(1)
    encode, decode = shared_basis(moments, weights)
    turn = decode.repeat_interleave(per, dim=0)
    return torch.einsum("rgd,gdi->ri", encode, v), torch.einsum("ohd,hdr->ohr", o, turn)
