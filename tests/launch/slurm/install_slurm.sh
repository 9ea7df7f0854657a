#!/usr/bin/env bash
# Installs the packages that the Slurm tests need, if missing: slurm-wlm and munge, by apt-get as root. Starts nothing.
# If that is impossible it says why, and the tests skip.
set -euo pipefail
if command -v slurmctld slurmd munged srun > /dev/null; then exit 0; fi
if ! command -v apt-get > /dev/null; then echo "Slurm tests will be skipped: no apt-get here; install slurm-wlm and munge by hand."; exit 0; fi
if [ "$(id -u)" != 0 ]; then echo "Slurm tests will be skipped: not root; run: sudo apt-get install slurm-wlm munge"; exit 0; fi
export DEBIAN_FRONTEND=noninteractive
# policy-rc.d: the packages' own daemons must not start; the tests start theirs.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then printf '#!/bin/sh\nexit 101\n' > "$policy" && chmod +x "$policy" && trap 'rm -f "$policy"' EXIT; fi
if ! { apt-get update -qq && apt-get install -y -qq --no-install-recommends slurm-wlm munge; } > /dev/null 2>&1; then
  echo "Slurm tests will be skipped: apt-get cannot install slurm-wlm and munge here."
fi
