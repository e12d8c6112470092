"""`saccade check`: does a model give through saccade what its own attention gives?"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from saccade.cli import shared_options
from saccade.cli.failure import need
from saccade.cli.loading import check_model, load

if TYPE_CHECKING:
    from saccade.hf.check import Checked
    from saccade.hf.load import LoadedModel

EXAMPLES = """examples:
  saccade check --model smollm2
  saccade check -m model.gguf --swa 1024 --sinks 4
  saccade check -m folder -ctk int8 -ctv int8 -c 32768 --rope-scaling yarn
"""
STANDARD = (
    {"n_swa": 12, "n_sinks": 4},
    {"rope_scaling_type": "yarn", "rope_scale": 2.0},
    {"type_k": "int8", "type_v": "int8"},
    {"type_k": "int8", "type_v": "int4"},
    {"type_k": "fp8", "type_v": "fp8"},
    {"page_size": 16},
    {"sparse": "block_topk"},
    {"kv_policy": "snapkv", "kv_budget": 0.5},
    {"kv_policy": "ada_snapkv", "kv_budget": 0.5},
)
"""What is checked where no option is given."""


@shared_options.takes(context=shared_options.CONTEXT)
def run(
    model: shared_options.Model,
    device: shared_options.Device = "auto",
    dtype: shared_options.DType = "auto",
    weights: shared_options.Weights = "file",
    *,
    context: shared_options.Values,
) -> int:
    """Compare a model through saccade with its own attention, for the options given or for all."""
    check_model(model)
    given = any(value is not None for value in context.values())
    wanted = [shared_options.context_params(context)] if given else [
        shared_options.context_params(values) for values in STANDARD
    ]  # fmt: skip
    need("transformers", purpose="saccade check")
    from saccade.hf.check import AS_IT_IS, check_eager, check_options, described
    from saccade.hf.model import HFModel

    loaded = load(model, device, dtype, weights)
    runnable = HFModel(loaded.model, loaded.name, loaded.n_ctx_train)
    found = [check_eager(runnable)]
    found += [check_options(runnable, p) for p in wanted if described(p) != AS_IT_IS]
    print(table(found, context))
    wrong = [each for each in found if each.refusal is None and not each.ok]
    if not wrong and (why := rounding(loaded)):
        print(why)
    for each in wrong:
        print(shared_options.with_flags(each.sentence(loaded.name), context), file=sys.stderr)
    return 2 if wrong or (given and not found[-1].ok) else 0


def table(found: list[Checked], typed: shared_options.Values) -> str:
    """A line for each comparison: the options, the difference found and allowed, the verdict."""
    options = [shared_options.with_flags(each.options, typed) for each in found]
    width = max(map(len, options))
    lines = [f"{'options':{width}}  difference  allowed  verdict"]
    for name, each in zip(options, found, strict=True):
        figures = f"{'':10}  {'':7}" if each.refusal else f"{each.gap:10.1e}  {each.bound:7.0e}"
        lines.append(f"{name:{width}}  {figures}  {_verdict(each, typed)}")
    return "\n".join(lines)


def rounding(loaded: LoadedModel) -> str:
    """Why differences are larger than attention's own rounding, "" where they are not."""
    from saccade.hf.check_passes import is_half, rounds_products

    if rounds_products(loaded.model):
        cause = "products of many rows with packed weights round their input to bfloat16"
        without = "--weights f32"
    elif is_half(loaded.model):
        cause = f"every layer rounds to {str(loaded.model.dtype).removeprefix('torch.')}"
        without = "--dtype f32"
    else:
        return ""
    return (
        f"Differences of this size are rounding: {cause}. Allowed is three times what that was "
        f"measured to cost here. With {without} attention's own rounding is left."
    )


def _verdict(found: Checked, typed: shared_options.Values) -> str:
    if found.refusal is not None:
        return f"refused: {shared_options.with_flags(found.refusal, typed)}"
    if found.ok and found.bound >= 1:
        return "not told apart: rounding alone changes these logits by more than their size"
    return "the same" if found.ok else "DIFFERENT"
