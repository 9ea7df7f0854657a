"""Verifiers: rewards of answers by rules, without a model.

    {"kind": "math", ...} --parse_verifier--> Verifier       in a child process (worker.py), which imports no torch
    samples --Judge--> Reward(value or failure)               in the trainer (judge.py): time limit, range, counts

A verifier that raises, hangs or gives something that is not a number in its range costs its answer the reward, never the run.
"""
