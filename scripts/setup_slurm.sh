#!/usr/bin/env bash
# Install what tests/slurm starts its cluster from, where that can be done: Debian's or Ubuntu's SLURM, as root.
# Elsewhere those tests are skipped, and say so, or with BRIDGE_TEST_STRICT=1 fail. Idempotent; no daemon is
# started, and no file of /etc is needed.
set -euo pipefail

packages=(slurmctld slurmd slurm-client munge iproute2)

say() { printf 'setup_slurm: %s\n' "$*"; }

missing=()
for package in "${packages[@]}"; do
    dpkg-query --show --showformat='${db:Status-Status}' "$package" 2>/dev/null | grep -qx installed ||
        missing+=("$package")
done
if ((${#missing[@]} == 0)); then
    say "${packages[*]} are there"
elif [[ $(id -u) != 0 ]] || ! command -v apt-get >/dev/null; then
    say "WARNING: no root or no apt-get, so ${missing[*]} cannot be installed and tests/slurm will be SKIPPED"
elif ! { apt-get update -qq &&
    DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 apt-get install -y -qq --no-install-recommends "${missing[@]}"; } \
    >/dev/null; then
    say "WARNING: ${missing[*]} cannot be installed, so tests/slurm will be SKIPPED"
else
    say "installed ${missing[*]}"
fi
