#!/usr/bin/env bash
# All tests, as `make test` runs them, side by side: run_all.sh PYTHON [options of pytest]
#
# The Slurm tests mostly wait: they share three clusters, beside all the others. These leave the CPU
# to them (nice), because it is the Slurm tests that have limits in seconds. What the Slurm tests
# print is shown at the end. Fails if a test failed, or if none was found (pytest's exit code 5).

set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
python=$1 # not from the environment, which the tests would inherit
shift
log=$(mktemp)
trap 'kill $(jobs -p) 2>/dev/null; rm -f "$log"' EXIT
trap 'exit 130' INT

"$python" -m pytest -o testpaths=tests/slurm -n 3 --dist worksteal -m slurm "$@" >"$log" 2>&1 &
slurm=$!
nice "$python" -m pytest -n logical --maxprocesses 4 --dist loadfile -m "not slurm" "$@"
codes=$?
wait "$slurm"
codes+=" $?"
echo "The Slurm tests:"
cat "$log"
[[ $codes != '5 5' && $codes =~ ^[05]\ [05]$ ]]
