#!/usr/bin/env bash
# Install what the Slurm tests need (Slurm, munge, shellcheck) from the packages of Debian or Ubuntu,
# as root. Does nothing where they are installed already; starts no service.

set -euo pipefail

missing=0
for program in slurmctld slurmd sbatch munged shellcheck; do
    PATH=$PATH:/usr/sbin command -v "$program" >/dev/null || missing=1
done
((missing)) || exit 0

if [[ $EUID != 0 ]] || ! command -v apt-get >/dev/null; then
    echo "error: the Slurm tests need slurm-wlm and munge, which this script installs as root on" \
        "Debian or Ubuntu; without them these tests are skipped" >&2
    exit 1
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get -o DPkg::Lock::Timeout=120 install -y -qq --no-install-recommends slurm-wlm munge shellcheck
