"""A model under ContextParams, as comparisons run it."""

import torch

from saccade.evals.subject import Ours
from saccade.hf.model import HFModel
from saccade.runtime.params import ContextParams
from tests.tiny_models import tiny_config, tiny_model


def test_important_tokens_are_chosen_and_their_caches_compressed_in_one_row():
    params = ContextParams(n_ctx=256, kv_policy="snapkv", kv_budget=0.25)
    tokens = torch.randint(3, 120, (160,), generator=torch.Generator().manual_seed(2))
    model = HFModel(tiny_model(tiny_config("llama")))
    ours = Ours(model, params, 0.5, reserve=200)
    ours.read(tokens)
    assert ours.ctx.seen == 80
    kept = [store.num_slots for store in ours.ctx.cache.stores]
    assert kept == [20] * len(kept)
