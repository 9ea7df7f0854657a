"""The child process in which verifiers run. `judge.py` starts it; its argument is the DESCRIPTOR for results.

    stdin: {"verifier": {...}, "memory_bytes": N}, then a sample a line     DESCRIPTOR: {"ready": ...}, a reward a line

A user's function may print and start threads: standard output goes to standard error, results to a descriptor of their own.
"""

import json
import numbers
import os
import resource
import sys
from typing import IO, Any

from data.system.parent import end_with_parent
from recipes.schema.errors import StratumError
from train.align.verify.sample import Sample
from train.align.verify.verifier import parse_verifier

_MESSAGE_CHARS = 300


def main() -> None:
    """Open the verifier, then answer every line of stdin until it ends."""
    end_with_parent()
    results = os.fdopen(int(sys.argv[1]), "w", buffering=1)
    os.dup2(2, 1)
    request = json.loads(sys.stdin.readline())
    most = resource.getrlimit(resource.RLIMIT_AS)[1]  # a limit of the shell or the job may be lower
    limit = request["memory_bytes"] if most == resource.RLIM_INFINITY else min(request["memory_bytes"], most)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        verifier = parse_verifier(request["verifier"])
    except StratumError as error:
        _say(results, {"refused": str(error), "error": type(error).__name__})
        return
    _say(results, {"ready": [verifier.low, verifier.high]})
    for line in sys.stdin:
        plain = json.loads(line)
        try:
            value = verifier.reward(Sample(plain["prompt"], plain["answer"], plain["facts"]))
            is_number = isinstance(value, numbers.Real)  # NumPy's too; True is 1 and False is 0
            _say(results, {"value": float(value)} if is_number else {"type": type(value).__name__})
        except MemoryError:
            _say(results, {"raised": "MemoryError: more memory than the limit"})
        except Exception as error:  # a verifier may raise anything; the trainer counts it
            _say(results, {"raised": f"{type(error).__name__}: {error}"[:_MESSAGE_CHARS]})


def _say(results: IO[str], message: dict[str, Any]) -> None:
    results.write(json.dumps(message) + "\n")
    results.flush()


if __name__ == "__main__":
    main()
