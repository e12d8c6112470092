#!/usr/bin/env bash
# Build the C++ kernels for aarch64 and run their contract (tests/cpp) in an emulator.
#
# Needs a cross-compiler and qemu (on aarch64 g++ alone), and says in one line which is missing.
# About a minute the first time, some seconds where no source has changed.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ "$(uname -m)" = aarch64 ]; then compiler=g++ emulator=; else compiler=aarch64-linux-gnu-g++ emulator=qemu-aarch64-static; fi
for tool in "$compiler" $emulator; do
  if ! command -v "$tool" >/dev/null; then
    echo "== NEON was NOT tested: $tool is not installed (Debian: g++-aarch64-linux-gnu, qemu-user-static)"
    exit 0
  fi
done
build=build/neon
mkdir -p "$build"
flags=(-std=c++20 -O3 -fno-math-errno -Wall -Wextra -Wno-array-bounds) # GCC 12 warns of std::sort over five numbers

# Files that need Python, through other headers too, are left out.
python='nanobind|Python\.h'
for _ in 1 2 3; do
  headers=$({ grep -lE "$python" csrc/*.h || true; } | xargs -r -n 1 basename | paste -sd '|')
  python="nanobind|Python\.h|\"(${headers:-none})\""
done

# Sources that name SACCADE_TARGET are compiled once for each target.
newest=$(ls -t csrc/* tests/cpp/* scripts/neon.sh | head -1)
jobs=()
objects=()
add() { # SOURCE OBJECT FLAGS...
  objects+=("$build/$2")
  if [ ! "$build/$2" -nt "$newest" ]; then jobs+=("$compiler ${flags[*]} ${*:3} -c $1 -o $build/$2"); fi
}
for source in csrc/*.cpp tests/cpp/*.cpp; do
  name=$(basename "$source" .cpp)
  if grep -qE "$python" "$source"; then continue; fi
  if grep -q SACCADE_TARGET "$source"; then
    add "$source" "$name-neon.o" -DSACCADE_TARGET=neon -DSACCADE_NEON
    add "$source" "$name-scalar.o" -DSACCADE_TARGET=scalar
  else
    add "$source" "$name.o"
  fi
done
if [ ${#jobs[@]} -gt 0 ]; then printf '%s\n' "${jobs[@]}" | xargs -P 2 -I{} sh -c '{}'; fi
"$compiler" -static -pthread "${objects[@]}" -o "$build/contract"
$emulator "$build/contract"
