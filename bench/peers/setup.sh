#!/bin/sh
# Makes a virtual environment for each peer of the bench, from PyPI alone: build/peers/NAME.
#   bench/peers/setup.sh [kt] [llama.cpp]     default: both; PYTHON names the interpreter
set -eu

KT_KERNEL=0.7.2
LLAMA_CPP_PYTHON=0.3.36

cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-python3}
[ $# -gt 0 ] || set -- kt llama.cpp

environment() {
  echo "== build/peers/$1"
  "$PYTHON" -m venv --clear "build/peers/$1"
  "build/peers/$1/bin/python" -m pip install --quiet --disable-pip-version-check numpy
}

# The wheel's extension alone is used: torch and triton, which its package asks for, stay out.
kt() {
  environment kt
  build/peers/kt/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
    --only-binary kt-kernel "kt-kernel==$KT_KERNEL"
}

# PyPI has llama.cpp as source only. Its library ggml, built for this very processor as the package
# would build it, takes two to five minutes; the rest of llama.cpp is not needed.
llama_cpp() {
  environment llama.cpp
  prefix=$PWD/build/peers/llama.cpp
  build=$(mktemp -d)
  trap 'rm -rf "$build"' EXIT
  "$prefix/bin/python" -m pip install --quiet --disable-pip-version-check "cmake>=3.25" ninja
  "$prefix/bin/python" -m pip download --quiet --disable-pip-version-check --no-deps \
    --no-binary llama-cpp-python --dest "$build" "llama-cpp-python==$LLAMA_CPP_PYTHON"
  tar -xzf "$build"/llama_cpp_python-*.tar.gz -C "$build"
  PATH="$prefix/bin:$PATH" cmake -S "$build"/llama_cpp_python-*/vendor/llama.cpp -B "$build/out" \
    -G Ninja -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DGGML_OPENMP=OFF \
    -DLLAMA_BUILD_COMMON=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF \
    -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_SERVER=OFF >"$build/log" || { cat "$build/log"; exit 1; }
  PATH="$prefix/bin:$PATH" nice cmake --build "$build/out" --target ggml ggml-cpu \
    --parallel "${JOBS:-2}" >"$build/log" || { cat "$build/log"; exit 1; }
  rm -rf "$prefix/ggml"
  mkdir -p "$prefix/ggml/lib"
  cp -P "$build"/out/bin/libggml*.so* "$prefix/ggml/lib/"
  echo "$LLAMA_CPP_PYTHON" >"$prefix/ggml/VERSION"
  rm -rf "$build"
  trap - EXIT
}

for peer in "$@"; do
  case $peer in
    kt) kt ;;
    llama.cpp) llama_cpp ;;
    *) echo "setup.sh knows the peers kt and llama.cpp, not '$peer'" >&2; exit 2 ;;
  esac
done
