#!/usr/bin/env bash
# Build the C++ kernels with a sanitizer and run their contract tests under it.
#
#   scripts/sanitize.sh address    addresses and undefined behaviour (CI)
#   scripts/sanitize.sh thread     data races of the thread pool
#   BUILD_ONLY=1 scripts/sanitize.sh address
set -euo pipefail
cd "$(dirname "$0")/.."
kind=${1:-address}
venv=${VENV:-.venv}
python=$PWD/$venv/bin/python
build=build/sanitize-$kind

"$python" -m pip install --quiet --disable-pip-version-check -c constraints.txt nanobind cmake ninja
PATH=$PWD/$venv/bin:$PATH cmake -S . -B "$build" -G Ninja -DSACCADE_SANITIZE="$kind" \
  -DCMAKE_BUILD_TYPE=RelWithDebInfo -DCMAKE_CXX_FLAGS_RELWITHDEBINFO="-O1" -DPython_EXECUTABLE="$python" >"$build.log" 2>&1 || { cat "$build.log"; exit 1; }
"$venv/bin/cmake" --build "$build" -j 2
if [ -n "${BUILD_ONLY:-}" ]; then exit; fi

# A package of its own: without site (-S) the editable install cannot shadow it.
site=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
rm -rf "$build/package" && mkdir -p "$build/package"
cp -r saccade tests pyproject.toml "$build/package"
cp "$build"/_cpu*.so "$build/package/saccade"

cd "$build/package"
case $kind in
  address) library=libasan.so ;;
  thread) library=libtsan.so ;;
esac
# libstdc++ as well, or the sanitizer finds no __cxa_throw to hand exceptions on to.
export LD_PRELOAD="$(g++ -print-file-name=$library) $(g++ -print-file-name=libstdc++.so)"
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
export TSAN_OPTIONS="ignore_noninstrumented_modules=1 halt_on_error=1 die_after_fork=0"
export PYTHONPATH=$PWD:$site
shift || true
check() { "$python" -S -m pytest -p no:cacheprovider -q "$@"; }
[ $# -gt 0 ] && { check "$@" -k "cpu and not compile"; exit; }
# The contract suite as far as it concerns these kernels, the fuzzed raw binding, gradients, packed weights; in two processes.
check tests/ops/test_cpu.py tests/ops/test_cpu_pairs.py -k "not compile" >"$OLDPWD/$build.second.log" 2>&1 &
second=$!
check tests/ops/test_cpu_{workspace,binding,gradients,hadamard,integer_sums}.py tests/ops/test_backends.py -k "cpu and not compile" || failed=1
check tests/ops/linear/test_packed_linear.py tests/ops/linear/test_blocks.py || failed=1
wait $second || failed=1
cat "$OLDPWD/$build.second.log"
exit ${failed:-0}
