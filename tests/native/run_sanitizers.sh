#!/usr/bin/env bash
# Builds the C++ tests, without Python, under AddressSanitizer + UndefinedBehaviorSanitizer and under
# ThreadSanitizer, and runs them. Needs cmake, ninja and a compiler on PATH.
set -euo pipefail

root=$(cd "$(dirname "$0")/../.." && pwd)

check() {
  local name=$1 sanitizers=$2
  local build="$root/build/sanitize-$name"
  echo "== $sanitizers"
  cmake -G Ninja -S "$root" -B "$build" -DHYBRIDK2_SANITIZE="$sanitizers" -DHYBRIDK2_WERROR=ON >"$build.log" ||
    { cat "$build.log"; exit 1; }
  cmake --build "$build" >>"$build.log" || { tail -n 50 "$build.log"; exit 1; }
  for test in "$build"/test_*; do
    echo "-- $(basename "$test")"
    "$test"
  done
}

mkdir -p "$root/build"
export UBSAN_OPTIONS=print_stacktrace=1
check address address,undefined
# High-entropy address spaces of new kernels leave older ThreadSanitizers no room: fixed layout.
check thread thread
