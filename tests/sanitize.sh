#!/usr/bin/env bash
# Runs every CUDA kernel on small problems under compute-sanitizer's tools; needs an NVIDIA GPU and the CUDA toolkit.
# One line a tool: its summary, the seconds that it took and how many calls each set of kernels served, or its whole
# report where it found something. Where sets of kernels are named (naive, sm80, sm90), only these run.
#
#     ninja -C build/dev sanitized && tests/sanitize.sh build/dev/cuda/sanitized [SET]...
set -uo pipefail
program=${1:?"the program sanitized of a build directory"}
shift
status=0
for tool in memcheck racecheck synccheck initcheck; do
  arguments=("$@")
  [ $tool = initcheck ] && arguments+=(unpoisoned)
  begin=$SECONDS
  report=$(compute-sanitizer --tool $tool --error-exitcode 9 "$program" "${arguments[@]}" 2>&1)
  code=$?
  if [ $code -eq 0 ]; then
    calls=$(grep ' calls$' <<<"$report" | paste -sd, | sed 's/,/, /g')
    printf '%-10s %s (%d s; %s)\n' $tool "$(grep SUMMARY <<<"$report" | tail -n 1)" $((SECONDS - begin)) "$calls"
  else
    printf '%s\n%-10s FAILED (%d)\n' "$report" $tool $code
    status=1
  fi
done
exit $status
