"""A simulated `stratum train` for tests of the launcher: the same signals, exit statuses and files, without torch.

    python -m launch.local.rank simulated_train RUN_FOLDER --steps 40 [--fail RANK:STEP:HOW]...

Each step takes `--step-s`. Rank 0 writes metrics.jsonl and checkpoints/latest. A `--fail` happens once per run folder (or
twice with `twice`, each time with `always`), so that a restart gets past it. HOW: raise, error (status 2), kill, peer (raise
"Connection closed by peer", slightly late), hang (never end, whatever signal arrives). STEP 0 is before signals are handled,
which takes `--start-s`. With `--hold STEP` a run that starts at step 0 waits at that step for a signal, so that a test has as
much time as it needs.
"""

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path

SAVE_EVERY = 10


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--step-s", type=float, default=0.02)
    parser.add_argument("--save-s", type=float, default=0.0)
    parser.add_argument("--fail", action="append", default=[])
    parser.add_argument("--hold", type=int, default=0)
    parser.add_argument("--patience-s", type=float, default=2.0)
    parser.add_argument("--end-s", type=float, default=0.0)
    parser.add_argument("--start-s", type=float, default=0.0)
    own = parser.parse_args()
    rank = int(os.environ["RANK"])
    received: list[int] = []
    for failure in own.fail:
        _fail(failure, own.folder, rank=rank, step=0)
    time.sleep(own.start_s)  # imports: no signal is handled yet

    def note(number: int, _frame: object) -> None:
        received.append(number)
        for watched in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(watched, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, note)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
    checkpoints = own.folder / "checkpoints"
    checkpoints.mkdir(parents=True, exist_ok=True)
    (own.folder / "recipe.yaml").write_text(f"run: {{steps: {own.steps}}}\n")
    latest = checkpoints / "latest"
    step = int(latest.read_text()[5:]) if latest.exists() else 0
    print(f"rank {rank} of {os.environ['WORLD_SIZE']} starts after step {step}", flush=True)
    if "SLURM_JOB_ID" in os.environ:
        print(f"node {os.environ.get('SLURMD_NODENAME', 'none')}", flush=True)
        print(f"CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', 'none')}", flush=True)
    is_held = own.hold > 0 and step == 0
    while step < own.steps:
        time.sleep(own.step_s)
        while is_held and step == own.hold and not received:
            time.sleep(0.02)
        step += 1
        if rank == 0:
            line = {"kind": "step", "step": step, "loss": 1 / step, "tokens_per_s": 100.0, "time": time.time()}
            with (own.folder / "metrics.jsonl").open("a") as stream:
                stream.write(json.dumps(line) + "\n")
        for failure in own.fail:
            _fail(failure, own.folder, rank=rank, step=step)
        is_stopping = _meet(rank, step, received=received, patience_s=own.patience_s)
        if is_stopping is None:
            return 128 + received[0]  # no save without the others
        if step % SAVE_EVERY == 0 or is_stopping or step == own.steps:
            time.sleep(own.save_s)
            if rank == 0:
                name = f"step_{step:08d}"
                (checkpoints / name).mkdir(exist_ok=True)
                latest.write_text(name)
        if is_stopping:
            print(f"stopped at step {step}", flush=True)
            time.sleep(own.end_s)
            return 128 + received[0] if received else 0
    print("finished", flush=True)
    return 0


def _meet(rank: int, step: int, *, received: list[int], patience_s: float) -> bool | None:
    """Wait until the other ranks reach this step, as a collective operation does: forever if one has died.

    -> whether any of them received a stop signal; None if one is still missing `patience_s` after a signal.
    """
    folder, world = Path(os.environ["STRATUM_LOGS"]), int(os.environ["WORLD_SIZE"])
    mine = folder / f".at-{rank}-{step}"
    mine.with_suffix(".new").write_text("stop" if received else "go")
    mine.with_suffix(".new").rename(mine)
    marks = [folder / f".at-{peer}-{step}" for peer in range(world)]
    deadline = None
    while not all(mark.exists() for mark in marks):
        time.sleep(0.002)
        if received:
            deadline = deadline or time.monotonic() + patience_s
            if time.monotonic() > deadline:
                return None
    return any(mark.read_text() == "stop" for mark in marks)


def _fail(failure: str, folder: Path, *, rank: int, step: int) -> None:
    who, when, how, *often = failure.split(":")
    if rank != int(who) or step != int(when):
        return
    before = len(list(folder.glob(f"failed-{who}-{when}-{how}*")))
    if before >= {"": 1, "twice": 2, "always": 1 << 30}["".join(often)]:
        return
    (folder / f"failed-{who}-{when}-{how}{before or ''}").touch()
    match how:
        case "raise":
            raise ValueError(f"rank {rank} broke at step {step}")
        case "peer":
            time.sleep(0.3)
            raise RuntimeError("Connection closed by peer")
        case "error":
            sys.stderr.write(f"error on rank {rank}: data.folder=nowhere is not there.\n" if rank else "error: no.\n")
            sys.exit(2)
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "hang":
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
                signal.signal(number, signal.SIG_IGN)
            print("hanging", flush=True)
            time.sleep(600)


if __name__ == "__main__":
    sys.exit(main())
