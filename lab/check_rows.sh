#!/bin/bash
# Correctness on the card, and every kernel that time_rows.sh times, compiled.
(for dim in 64 128 256; do for what in packed lengths pages; do
  timeout 100 python lab/visit_forward.py $what $dim 2>&1 | grep -v "^ok" | tail -3 & done; done; wait) &
(timeout 105 python -m pytest -p no:benchmark tests/ops/test_gluon.py -q -m gpu -n 6 2>&1 | tail -4) &
(timeout 100 python lab/visit_rows.py compile 2>&1 | tail -5) &
(timeout 100 python lab/visit_rows.py doors 2>&1 | tail -12) &
wait
