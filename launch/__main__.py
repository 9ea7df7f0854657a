"""`python -m launch COMMAND ...`, an older spelling of `stratum COMMAND ...`."""

import sys

from recipes.schema.options import hand_over

if __name__ == "__main__":
    words = sys.argv[1:]
    hand_over(*(["launch"] if words[:1] in (["local"], ["slurm"], ["kubernetes"], ["node"]) else []), *words)
