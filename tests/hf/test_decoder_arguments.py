"""What the C++ decoder is told in error is refused by the extension itself, with a sentence."""

from __future__ import annotations

import pytest
import torch

from saccade.cache import PagedCache, QuantizedCache
from saccade.core import DenseKV
from saccade.hf.decoder_layers import describe
from saccade.ops.attention.cpu.binding import BUILT, VIEWS, extension, record
from tests.tiny_models import tiny_config, tiny_model

pytestmark = pytest.mark.skipif(not BUILT, reason="the C++ kernels are not built")


def test_wrong_arguments_are_refused():
    """The extension checks shapes and addresses itself."""
    described = describe(tiny_model(tiny_config("llama")))
    parts = (described.hidden, described.layers, described.norm, described.head)
    decoder = extension().Decoder(*parts, 128, "")
    x = torch.zeros(1, 1, described.hidden)
    with pytest.raises(ValueError, match="no step has begun"):
        decoder.finish(record(x))
    with pytest.raises(ValueError, match="must be 64"):
        decoder.begin(record(x[..., :-1].contiguous()), 1)
    with pytest.raises(ValueError, match="1 to 9 rows"):
        decoder.begin(record(x.expand(1, 10, -1).contiguous()), 1)
    decoder.begin(record(x), 1)
    with pytest.raises(ValueError, match="no such layer"):
        decoder.back(99, record(x))
    with pytest.raises(ValueError):
        extension().Decoder(described.hidden + 2, *parts[1:], 128, "")


SLOTS = DenseKV(torch.zeros(1, 2, 8, 16), torch.zeros(1, 2, 8, 16))


def _quantized():
    cache = QuantizedCache(group=8, recent=3)
    cache.append(torch.randn(1, 2, 20, 16), torch.randn(1, 2, 20, 16))
    return cache.storage()


PLACES = {
    "behind the slots": (SLOTS, (8, 8, ()), "no room"),
    "before the slots": (SLOTS, (-1, -1, ()), "no room"),
    "no position of the slot": (SLOTS, (2, 3, ()), "begin at position 0"),
    "spans behind the slots": (SLOTS, (2, 2, ((0, 0, 9),)), "outside of the slots"),
    "spans that overlap": (SLOTS, (2, 2, ((0, 0, 3), (3, 2, 1))), "ascend in position"),
    "half a group": (_quantized, (4, 8, ()), "not so many quantized"),
    "more groups than there are": (_quantized, (4, 44, ()), "not so many quantized"),
    "fewer than none": (_quantized, (4, -4, ()), "not so many quantized"),
    "spans of quantized keys": (_quantized, (4, 20, ((0, 0, 4),)), "take no spans"),
    "other heads": (DenseKV(*[torch.zeros(1, 3, 8, 16)] * 2), (2, 2, ()), "must be 2"),
    "two fields": (SLOTS, (2, 2), "a place is"),
    "nothing known": (None, (2, 2, ()), "was not said"),
}


@pytest.mark.parametrize("case", PLACES)
def test_wrong_places_are_refused(case):
    view, place, message = PLACES[case]
    view = view() if callable(view) else view
    described = describe(tiny_model(tiny_config("llama")))
    parts = (described.hidden, described.layers, described.norm, described.head)
    decoder, x = extension().Decoder(*parts, 128, ""), torch.zeros(1, 1, described.hidden)
    decoder.begin(record(x), 1)
    if view is not None:
        decoder.stored(0, VIEWS[type(view)](view), view.hadamard, None, None)
    table = torch.zeros(1, 16)
    kinds = [(record(table), record(table), -1, 0)]
    with pytest.raises(ValueError, match=message):
        decoder.run(0, [(*place, 0)], kinds, [0] * 4)


def test_wrong_layers_and_tables_are_refused():
    described = describe(tiny_model(tiny_config("llama")))
    parts = (described.hidden, described.layers, described.norm, described.head)
    decoder, x = extension().Decoder(*parts, 128, ""), torch.zeros(1, 1, described.hidden)
    decoder.begin(record(x), 1)
    decoder.stored(3, VIEWS[DenseKV](SLOTS), False, None, None)
    tables = [(record(torch.zeros(1, n)), record(torch.zeros(1, n)), -1, 0) for n in (16, 18)]
    with pytest.raises(ValueError, match="layers that there are"):
        decoder.run(3, [(0, 0, (), 0)] * 2, tables, [0] * 4)
    with pytest.raises(ValueError, match="no such kind"):
        decoder.run(3, [(0, 0, (), 0)], tables, [2] * 4)
    with pytest.raises(ValueError, match="more than a head"):
        decoder.run(3, [(0, 0, (), 0)], tables, [1] * 4)
    pages = PagedCache(page_size=4)
    view = pages.append(torch.zeros(1, 2, 3, 16), torch.zeros(1, 2, 3, 16))
    with pytest.raises(ValueError, match="dense, quantized and ragged views alone"):
        decoder.stored(0, VIEWS[type(view)](view), False, None, None)
    with pytest.raises(ValueError, match="no such layer"):
        decoder.stored(4, VIEWS[DenseKV](SLOTS), False, None, None)
