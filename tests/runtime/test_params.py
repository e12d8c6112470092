"""ContextParams: names, defaults, and an error for every impossible option."""

import pytest

from saccade.runtime import ContextParams


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
        ({"type_k": "int8", "type_v": "int8", "n_swa": 8}, "cannot be combined with n_swa"),
        ({"offload_kqv": False, "page_size": 8}, "keeps plain keys in host memory"),
        ({"page_size": 0}, "page_size must be at least 1, got 0"),
        ({"page_size": 16, "n_swa": 8}, "page_size=16 needs plain keys of all tokens"),
    ],
)
def test_errors(options, text):
    with pytest.raises(ValueError, match=text):
        ContextParams(**options)
