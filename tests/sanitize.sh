#!/usr/bin/env bash
# Runs every CUDA kernel on small problems under compute-sanitizer's tools; needs an NVIDIA GPU and the CUDA toolkit.
# One line a tool: its summary, or its whole report where it found something.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD:$PWD/tests
export XLA_PYTHON_CLIENT_PREALLOCATE=false
export XLA_PYTHON_CLIENT_ALLOCATOR=platform # an allocation of its own for every array, so that overruns are seen
export XLA_FLAGS="--xla_gpu_enable_command_buffer= ${XLA_FLAGS:-}"
status=0
for tool in memcheck racecheck initcheck synccheck; do
  filter=(--kernel-name kernel_substring=jax_natten)
  [ $tool = initcheck ] && filter=() # it has to see the kernels that write what ours read
  report=$(compute-sanitizer --tool $tool "${filter[@]}" --error-exitcode 9 \
    "${PYTHON:-python3}" tests/sanitized.py 2>&1)
  code=$?
  if [ $code -eq 0 ]; then
    printf '%-10s %s\n' $tool "$(grep -E 'SUMMARY' <<<"$report" | tail -n 1)"
  else
    printf '%s\n%-10s FAILED (%d)\n' "$report" $tool $code
    status=1
  fi
done
exit $status
