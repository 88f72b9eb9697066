#!/usr/bin/env bash
# Install Chromium, in which the tests look at the pages of data_pipeline.inspect and kernels.profile, from
# the packages of Debian, as root. Does nothing where it is installed already.

set -euo pipefail

command -v chromium >/dev/null && exit 0

if [[ $EUID != 0 ]] || ! command -v apt-get >/dev/null; then
    echo "error: the tests of the data report need chromium, which this script installs as root on" \
        "Debian; without it these tests are skipped" >&2
    exit 1
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
# Without the recommended packages: a headless browser needs no desktop. With one font for the text.
apt-get -o DPkg::Lock::Timeout=120 install -y -qq --no-install-recommends chromium fonts-dejavu-core
