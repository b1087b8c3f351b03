#!/usr/bin/env bash
# Builds the compiled library with AddressSanitizer and UndefinedBehaviorSanitizer, apart from the installed one, and
# runs the tests of native code on it: tools/asan.sh [--quick | arguments of pytest]
# Without arguments all of them, in two processes; --quick leaves some sizes and values of attention and loss out.
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
NATIVE=(--numprocesses 2 tests/test_*_native.py tests/test_layout.py tests/test_row_limits.py
  tests/test_frame_attention_order.py tests/test_tube_masked_loss_rows.py tests/test_invalid_indices.py
  tests/test_compiled_ops.py)
SAME_MEMORY="not peak_memory" # a process of the sanitizer takes more than the kernels ask for
case ${1:-} in
  "") set -- "${NATIVE[@]}" -k "$SAME_MEMORY" ;;
  --quick)
    EDGES="mm_rope or layout or around or head_dims or windows or nothing or strides or threads or slices or frozen"
    EDGES="($EDGES) and not order or any_target or invalid or do_not_fit"
    set -- "${NATIVE[@]}" -k "$SAME_MEMORY and ($EDGES)"
    ;;
esac
# Not captured: pytest would take a sanitizer's report with it when the process ends.
export OMP_NUM_THREADS=1
exec "$PYTHON" -m pytest -p no:cacheprovider --capture=no "$@"
