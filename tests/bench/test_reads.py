"""Reading alone, the ceiling whose samples alternate with decoding."""

import pytest

from saccade.bench import bars
from saccade.bench.cases import Bar
from saccade.bench.reads import READS, reading
from saccade.bench.table import title
from tests.bench import sample

NAME = "decode 32/8 D128 4k keys bf16"


def test_a_reader_reads_the_bytes_of_the_case():
    ours = sample.row(NAME, 0.001)
    found = reading(ours)
    if found is None:
        pytest.skip("built without the C++ kernels")
    row, call = found
    assert (row.backend, row.ours, row.case, title(row)) == (READS, False, NAME, "reading alone")
    assert 0.99 * ours.nbytes < row.nbytes <= ours.nbytes
    assert call() == ()


def test_without_the_extension_there_is_no_reader(monkeypatch):
    monkeypatch.setattr("saccade.bench.ceilings.extension", lambda: None)
    assert reading(sample.row(NAME, 0.001)) is None


def test_decoding_is_compared_with_the_reader_of_its_turns():
    record = sample.record()
    ours = next(r for r in record.rows if r.case == NAME and r.ours)
    reader = sample.row(NAME, 0.0008, backend=READS, ours=False)
    record.rows.append(reader)
    value = bars.value_of(Bar(measure="bandwidth", limit=0.8), ours, record)
    assert value == pytest.approx(0.8 * ours.nbytes / reader.nbytes)
