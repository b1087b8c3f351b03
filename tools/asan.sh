#!/usr/bin/env bash
# Builds the compiled library with AddressSanitizer and UndefinedBehaviorSanitizer, apart from the installed one, and
# runs the tests of native code on it: tools/asan.sh [arguments of pytest], by default all of them in two processes
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-$PWD/.venv/bin/python}
NINJA=$(command -v ninja || echo "$(dirname "$PYTHON")/ninja")
BUILD=$PWD/build/asan
STAGE=$BUILD/stage

cmake -S . -B "$BUILD" -G Ninja -DCMAKE_MAKE_PROGRAM="$NINJA" -DPython_EXECUTABLE="$PYTHON" \
  -DCMAKE_INSTALL_PREFIX="$STAGE" -DLUMOS_SANITIZE=ON -DLUMOS_CUDA=OFF >"$BUILD.log"
cmake --build "$BUILD" --target install >>"$BUILD.log" || { cat "$BUILD.log"; exit 1; }

# The sanitised libraries go into a copy of the package, so that the checkout's own stay as they are.
rm -rf "$STAGE"/{tests,lumos_kernels,lumos,bench}
cp -r pyproject.toml tests lumos_kernels lumos bench "$STAGE"
rm -f "$STAGE"/lumos_kernels/*.so
cmake --install "$BUILD" >>"$BUILD.log"

# libstdc++ must be preloaded too: without it every C++ exception ends in the sanitizer's __cxa_throw check.
# torch and CPython keep memory for the life of the process, which the leak check would report.
export LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libstdc++.so)"
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1
cd "$STAGE"
if [ $# -eq 0 ]; then
  set -- --numprocesses 2 tests/test_*_native.py tests/test_layout.py
fi
# Not captured: pytest would take a sanitizer's report with it when the process ends.
export OMP_NUM_THREADS=1
exec "$PYTHON" -m pytest -p no:cacheprovider --capture=no "$@"
