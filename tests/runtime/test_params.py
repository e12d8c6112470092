"""ContextParams: names, defaults, and an error for every impossible option."""

import pytest

from saccade.runtime import ContextParams
from saccade.sparse import BlockTopK, XAttention


def test_defaults_change_nothing():
    params = ContextParams()
    assert params.flash_attn == "auto" and params.n_ctx is None and params.kv_policy is None


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"flash_attn": "yes"},
            "unknown flash_attn 'yes'; expected one of auto, ena",
        ),
        ({"type_k": "q3", "type_v": "q3"}, "unknown type_k 'q3'; expected one of f32, bf16"),
        ({"rope_scaling_type": "magic"}, "unknown rope_scaling_type 'magic'"),
        ({"n_ctx": 0}, "n_ctx must be at least 1, got 0"),
        ({"n_batch": 0}, "n_batch must be at least 1, got 0"),
        ({"n_swa": 0}, "n_swa must be at least 1, got 0"),
        ({"n_swa": 4, "n_sinks": -1}, "n_sinks must be at least 0, got -1"),
        ({"n_sinks": 4}, "n_sinks=4 needs a window: set n_swa"),
        ({"rope_freq_scale": 2.0}, r"rope_freq_scale is 1 / factor, in \(0, 1\], got 2.0"),
        ({"kv_policy": "magic", "kv_budget": 9}, "unknown kv_policy 'magic'; expected one of snap"),
        ({"kv_policy": "snapkv"}, "kv_policy and kv_budget go together"),
        ({"kv_policy": "snapkv", "kv_budget": 1.5}, r"as a share must be in \(0, 1\], got 1.5"),
        ({"kv_policy": "snapkv", "kv_budget": 0}, "kv_budget must be at least 1, got 0"),
        ({"type_k": "int8"}, "Set both"),
        ({"type_k": "fp8", "type_v": "int8"}, "or both as fp8. Set both"),
        ({"type_k": "f16"}, "must be equal"),
        (
            {"type_k": "int8", "type_v": "int8", "kv_policy": "ada_snapkv", "kv_budget": 9},
            "lets heads keep different numbers of keys",
        ),
        (
            {"offload_kqv": False, "page_size": 8},
            "keeps plain keys in host memory, which page_size=8 does not: leave one of them out",
        ),
        ({"page_size": 0}, "page_size must be at least 1, got 0"),
        ({"page_size": 16, "n_swa": 8}, "plain keys of all tokens, which n_swa=8 does not"),
        ({"n_ctx": "4096"}, "n_ctx must be a whole number, got '4096'"),
        ({"n_ctx": 4096.0}, "n_ctx must be a whole number, got 4096.0"),
        ({"n_ctx": True}, "n_ctx must be a whole number, got True"),
        ({"n_ctx": 10**400}, "n_ctx must be at most 281474976710656, got 1000"),
        ({"n_batch": None}, "n_batch must be a whole number, got None"),
        ({"n_keep": -1}, "n_keep must be at least 0, got -1"),
        ({"flash_attn": None}, "unknown flash_attn None"),
        ({"flash_attn": ["auto"]}, "unknown flash_attn"),
        ({"backend": "cuda"}, "unknown backend 'cuda'; expected one of reference"),
        ({"sparse": "strided"}, "sparse must be a pattern with its sizes"),
        ({"offload_kqv": 1}, "unknown offload_kqv 1; expected one of True, False"),
        ({"fused_layers": "yes"}, "unknown fused_layers 'yes'"),
        ({"rope_freq_base": "1e6"}, "rope_freq_base must be a finite number of .*, got '1e6'"),
        ({"rope_freq_base": float("nan")}, "rope_freq_base must be a finite number of .*, got nan"),
        ({"rope_freq_base": 0}, "rope_freq_base must be above 0, got 0"),
        (
            {"rope_freq_scale": float("nan")},
            "rope_freq_scale must be a finite number of .*, got nan",
        ),
        (
            {"yarn_attn_factor": float("inf")},
            "yarn_attn_factor must be a finite number of .*, got inf",
        ),
        ({"kv_policy": "snapkv", "kv_budget": "9"}, "or saccade.Bytes, got '9'. Write 512, 0.25"),
        ({"kv_policy": "snapkv", "kv_budget": True}, "kv_budget must be a whole number, got True"),
        ({"kv_policy": "snapkv", "kv_budget": float("nan")}, r"must be in \(0, 1\], got nan"),
        ({"kv_policy": "snapkv", "kv_budget": 9, "n_keep": 4}, "cannot be shifted"),
        ({"n_draft": 0}, "n_draft must be at least 1, got 0"),
        ({"n_draft": 9, "sparse": BlockTopK()}, "n_draft must be at most 8, got 9"),
        ({"n_draft": 4}, "drafts by a pattern that reads few keys .* got sparse=None. Set one"),
        ({"n_draft": 4, "sparse": XAttention()}, "drafts by a pattern that reads few keys"),
        ({"n_draft": 4, "sparse": BlockTopK(), "n_swa": 64}, "does not go with n_swa=64, whose"),
        (
            {"n_draft": 4, "sparse": BlockTopK(), "type_k": "int8", "type_v": "int8"},
            "does not go with type_k='int8', whose groups",
        ),
        (
            {"n_draft": 4, "sparse": BlockTopK(), "kv_policy": "snapkv", "kv_budget": 9},
            "n_draft=4 does not go with kv_policy='snapkv', which removes keys",
        ),
    ],
)
def test_errors(options, text):
    with pytest.raises(ValueError, match=text):
        ContextParams(**options)
