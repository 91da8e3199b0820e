#!/usr/bin/env bash
# Builds the CPU module under the address and undefined-behaviour sanitizers, and runs the kernels' tests on it with
# every instruction set of the processor, or those named in TARGETS. Needs GCC, CMake and what the tests need; arguments
# go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
flags='-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g1'
cmake -S . -B "$work/build" -G Ninja -DPython_EXECUTABLE="$(command -v "$python")" -DJAX_NATTEN_CUDA=OFF \
  -DCMAKE_BUILD_TYPE=RelWithDebInfo -DCMAKE_CXX_FLAGS="$flags" ${CMAKE_ARGS:-} >"$work/log"
cmake --build "$work/build" -j 2 >>"$work/log" || { cat "$work/log"; exit 1; }
mkdir "$work/jax_natten"
cp jax_natten/*.py "$work"/build/_cpu*.so "$work/jax_natten"
export PYTHONPATH=$work:$PWD
# What XLA compiles is not what is looked at here.
export XLA_FLAGS=--xla_backend_optimization_level=0
export ASAN_OPTIONS=detect_leaks=0,abort_on_error=1 UBSAN_OPTIONS=print_stacktrace=1
LD_PRELOAD=$("${CXX:-g++}" -print-file-name=libasan.so):$("${CXX:-g++}" -print-file-name=libubsan.so)
export LD_PRELOAD
tests=(tests/test_cpu_kernels.py tests/test_goldens.py tests/test_frame.py)
available=$("$python" -P -c 'from jax_natten import _cpu; print(*_cpu.available_targets())')
for target in ${TARGETS:-$available}; do
  JAX_NATTEN_CPU_TARGET=$target "$python" -P -m pytest -q -n auto -p no:cacheprovider \
    -k 'not instruction_set and not bits' "${@:-${tests[@]}}" | tail -n 1 | sed "s/^/$target: /"
done
