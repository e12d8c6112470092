#!/bin/sh
# One visit: what racecheck makes of warp_specialize, in small kernels and in ours.  Logs in $OUT.
tool="/usr/local/cuda/bin/compute-sanitizer --tool racecheck"
for variant in plain uneven barriers both; do
    timeout 60 $tool python3 lab/race_warp_specialize.py $variant >/tmp/race_$variant.log 2>&1 &
done
timeout 70 $tool --racecheck-report all --print-limit 200 python3 scripts/sanitize_kernels.py gluon >"$OUT/gluon.log" 2>&1 &
timeout 70 python3 -m pytest -q -p no:benchmark -p no:cacheprovider --tb=short tests/ops/test_sdpa_gpu.py tests/ops/test_order.py tests/ops/test_gluon.py >"$OUT/tests.log" 2>&1 &
wait
for variant in plain uneven barriers both; do
    echo "== $variant"
    grep -v "Host Frame" /tmp/race_$variant.log | head -12
done
cat /tmp/race_*.log >"$OUT/race.log"
grep -A3 "hazard\|Error" "$OUT/gluon.log" | grep -v "Host Frame" | head -40
tail -4 "$OUT/gluon.log"
tail -5 "$OUT/tests.log"
