#!/bin/sh
# Check our kernels with compute-sanitizer: memcheck (addresses) and racecheck (shared memory).
#
#   scripts/sanitize_gpu.sh [GROUP...]        groups: see scripts/sanitize_kernels.py; default: all
#
# One kind of report is a known false positive and not counted: racecheck reports a race on the byte
# through which Triton's warp_specialize gives worker warps their task, in kernels where some warps
# are idle and barriers cover only some of the warps.  The byte is written before, and read after, a
# barrier of all warps; lab/race_warp_specialize.py, which shares no other memory, gets the same
# report (`both`).  The reads are those of the dispatch loop, in a Gluon kernel's first instructions.
#
# Needs an NVIDIA GPU and the CUDA toolkit.  LOGS=FOLDER keeps the logs.  Exit code 1: a tool found
# something, or a group did not end within SECONDS_EACH (default 100).
cd "$(dirname "$0")/.." || exit 2
PATH=$PATH:/usr/local/cuda/bin
tool=$(command -v compute-sanitizer) || { echo "compute-sanitizer is not installed (CUDA toolkit)." >&2; exit 2; }
groups=${*:-forward block_sparse varlen backward decode quantized kv_write gemv gluon_forward \
    gluon_block_sparse gluon_varlen gluon_backward gluon_decode gluon_quantized gluon_fp8}
logs=${LOGS:-$(mktemp -d)}
limit=${SECONDS_EACH:-100}
export PYTORCH_NO_CUDA_MEMORY_CACHING=1 # each tensor is an allocation of its own, with its own bounds

for group in $groups; do # compiled first, outside the tools
    timeout "$limit" python3 scripts/sanitize_kernels.py "$group" >"$logs/$group.plain" 2>&1 &
done
wait
for group in $groups; do
    grep -q "^ran $group" "$logs/$group.plain" || { echo "$group does not run: $logs/$group.plain"; tail -3 "$logs/$group.plain"; }
    for check in memcheck racecheck; do
        timeout "$limit" "$tool" --tool "$check" --print-limit 20 python3 scripts/sanitize_kernels.py "$group" \
            >"$logs/$group.$check" 2>&1 &
    done
done
wait
dispatch='Read access at [a-z_]*kernel+0x[1-3]\{0,1\}[0-9a-f][0-9a-f] in '
failed=0
for check in memcheck racecheck; do
    for group in $groups; do
        log=$logs/$group.$check
        said=$(grep "SUMMARY" "$log" | sed 's/=* *//')
        grep -q "^ran $group" "$log" || said="did not end within $limit s"
        reported=$(grep -c "Race reported between" "$log")
        if [ "$reported" -gt 0 ] && [ "$group" != "${group#gluon_}" ] && ! grep "Race reported between" "$log" | grep -qv "$dispatch"; then
            said="RACECHECK SUMMARY: 0 hazards but $reported reports of the dispatch of warp_specialize (known, see above)"
        fi
        case $said in
            "ERROR SUMMARY: 0 errors" | "RACECHECK SUMMARY: 0 hazards"*) ;;
            *) failed=1 ;;
        esac
        echo "$check $group: $said"
    done
done
exit $failed
