#!/usr/bin/env bash
# No instruction of a newer CPU may reach an older one. Proves, on a fresh build without sanitizers:
#   1. a kernel object defines one external symbol, its table: the linker has nothing else to merge;
#   2. objects outside the AVX-512 kernels contain no 512-bit or mask register, and objects outside
#      the kernels no 256-bit register;
#   3. where qemu-x86_64 is installed: the tests run on an emulated AVX2-only Haswell and on a CPU
#      without AVX.
# Needs cmake, ninja, a compiler and binutils on PATH.
set -euo pipefail

root=$(cd "$(dirname "$0")/../.." && pwd)
build="$root/build/isolation"
mkdir -p "$build"
cmake -G Ninja -S "$root" -B "$build" -DHYBRIDK2_SANITIZE=none -DHYBRIDK2_WERROR=ON >"$build.log" ||
  { cat "$build.log"; exit 1; }
cmake --build "$build" >>"$build.log" || { tail -n 50 "$build.log"; exit 1; }

failed=0
fail() { echo "FAILED: $*"; failed=1; }

for object in "$build"/CMakeFiles/kernels_*.dir/csrc/kernels/*.o; do
  symbols=$(nm --extern-only --defined-only --demangle "$object" | awk '{print $3}')
  echo "$(basename "$object") defines: $symbols"
  [[ $symbols =~ ^hybridk2::k[A-Za-z0-9]+Kernels$ ]] || fail "$object defines more than its table"
done

disassemble() { objdump --disassemble --no-show-raw-insn "$@"; }
for object in "$build"/CMakeFiles/{engine.dir/csrc,kernels_{scalar,amx_emulated}.dir/csrc/kernels}/*.o; do
  if disassemble "$object" | grep -E '%[yz]mm|%k[0-7]|\sv[a-z0-9]+ .*%xmm' | head -n 3 | grep .; then
    fail "$object uses AVX"
  fi
done
if disassemble "$build"/CMakeFiles/kernels_avx2.dir/csrc/kernels/*.o |
  grep -E '%zmm|%k[0-7]|%[xy]mm(1[6-9]|2[0-9]|3[01])' | head -n 3 | grep .; then
  fail "avx2.cc uses AVX-512"
fi

if command -v qemu-x86_64 >/dev/null; then
  for cpu in Haswell Westmere; do
    expected=$([[ $cpu == Haswell ]] && echo "scalar avx2 amx_emulated ok" || echo "scalar amx_emulated ok")
    found=$(qemu-x86_64 -cpu $cpu "$build/test_experts" 2>/dev/null) || true
    echo "$cpu: $found"
    [[ $found == "$expected" ]] || fail "on $cpu: expected '$expected'"
  done
else
  echo "skipped: qemu-x86_64 is not installed, nothing ran on an emulated older CPU"
fi
exit $failed
