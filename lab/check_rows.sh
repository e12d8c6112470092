#!/bin/bash
# Correctness on the card, and every kernel that time_rows.sh times, compiled.
export PYTHONPATH=lab/variants:$PYTHONPATH
for p in "v0 dense" "tree dense" "vG dense" "tree packed" "vG packed" "tree pages"; do
 timeout 108 python lab/visit_rows.py compile $p 2>&1 | grep -i "error\|BAD" | tail -3 & done
(for d in 64 256; do timeout 50 python lab/visit_rows.py small $d 2>&1 | grep -i error | tail -3; done) &
timeout 108 python lab/visit_rows.py more 128 2>&1 | grep -i error | tail -3 &
timeout 108 python -m pytest -p no:benchmark tests/ops/test_gluon.py -q -m gpu -n 6 2>&1 | tail -6 &
wait
echo checked
