#!/usr/bin/env bash
# Installs the packages that the Slurm tests need, if missing: slurm-wlm, munge and openssh-server, by apt-get as root. Starts
# nothing.
# If that is impossible it says why, and the tests skip.
set -euo pipefail
missing=0 # `command -v` of several names succeeds if one of them exists
for name in slurmctld slurmd munged srun /usr/sbin/sshd; do command -v "$name" > /dev/null || missing=1; done
if [ "$missing" = 0 ]; then exit 0; fi
if ! command -v apt-get > /dev/null; then echo "Slurm tests will be skipped: no apt-get here; install slurm-wlm, munge and openssh-server by hand."; exit 0; fi
if [ "$(id -u)" != 0 ]; then echo "Slurm tests will be skipped: not root; run: sudo apt-get install slurm-wlm munge openssh-server"; exit 0; fi
export DEBIAN_FRONTEND=noninteractive
# policy-rc.d: the packages' own daemons must not start; the tests start theirs.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then printf '#!/bin/sh\nexit 101\n' > "$policy" && chmod +x "$policy" && trap 'rm -f "$policy"' EXIT; fi
if ! { apt-get update -qq && apt-get install -y -qq --no-install-recommends slurm-wlm munge openssh-server; } > /dev/null 2>&1; then
  echo "Slurm tests will be skipped: apt-get cannot install slurm-wlm, munge and openssh-server here."
fi
