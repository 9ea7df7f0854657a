"""`python3 -m launch.doctor` in a checkout: `stratum doctor` before anything is installed. Readable by Python 3.8."""

from __future__ import annotations

import sys

from launch.doctor.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
