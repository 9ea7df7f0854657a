"""`make bench-quick`: has anything become slower against its peer? At most five minutes; exit status 1 where something has.

Each measure is a ratio: a pinned peer's seconds over ours for the same work, both timed in turn on this machine (>1: we are
faster). The ratios are compared with the ones in `tests/bench/baselines.json` for this kind of machine, because a processor's
vector units and caches move ours and the peer's speed differently. A ratio 10 % below its baseline is measured again, up to three
times: other work on the machine disturbs single measurements, a slower program is slower each time.

Every measure runs in a process of its own, one thread; computing is timed by the processor's clock, saves by the wall's. On a
kind of machine without baselines the ratios are printed and nothing is judged; `--store` writes them (median of three).

    python -m tests.bench.quick [--only experts rows] [--baselines FILE] [--store]
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

BASELINES = Path(__file__).with_name("baselines.json")
DROP = 0.10
"""Part of a baseline that a ratio may lack."""
TRIES = 3
Ratios = dict[str, float]


def train() -> Ratios:
    """Training steps against transformers with our memory setting: rows of 256, and of 2,048 for Gemma 2's attention."""
    import torch  # each measure imports what it needs: they run in processes of their own

    from tests.bench import model

    timing = model.Timing(threads=1, clock="cpu")
    torch.set_num_threads(1)
    peer = model.Peer(keeps_memory=True, timing=timing)
    found = {}
    for family, length in (("hybrid", 256), ("hybrid", 2048), ("gemma", 256), ("gemma", 2048)):
        mine, (theirs,) = model.in_turn(family, length, [peer], rounds=3, timing=timing)
        found[f"{family}, rows of {length}"] = min(theirs) / min(mine)
    peer.close()
    return found


def generate() -> Ratios:
    """The inference engine against transformers' `generate`, same weights and greedy tokens."""
    import torch  # as in `train`

    from tests.bench import inference

    torch.set_num_threads(1)
    inference.CLOCK = "cpu"
    found = {}
    for family in ("hybrid", "gemma"):
        shape = inference.shapes(256)[family]
        with inference.ours_and_theirs(shape) as (ours, theirs), torch.no_grad():
            for batch in (1, 16):
                prompts = inference.prompts_of(batch, inference.PROMPT)
                inference.engine_tokens(ours, shape, prompts, 4)
                pairs = [
                    (
                        inference.engine_tokens(ours, shape, prompts, 48)[1],
                        inference.their_tokens(theirs, prompts, 48)[1],
                    )
                    for _ in range(3)
                ]
                mine, peer = map(min, zip(*pairs, strict=True))
                found[f"{family}, batch {batch}"] = peer / mine
    return found


def experts() -> Ratios:
    """An expert layer against transformers' Nemotron-H experts, forward and backward."""
    from tests.bench import moe

    seconds, _ = moe.measured(moe.parser().parse_args(["--rounds", "5"]))
    return {"forward and backward": min(seconds["transformers' experts"]) / min(seconds["expert layer"])}


def rows() -> Ratios:
    """Random-order reading against litdata: plain rows, best-fit rows from a stored packing and packed again."""
    from tests.bench import data

    names = ("ours", "ours_best_fit", "ours_packed_anew", "litdata")
    data.prepare([2048], list(names))
    rates = dict.fromkeys(names, 0.0)
    for _ in range(2):
        for name in names:
            figures = data.measure(name, 2048, 0.7)
            if figures is None:
                raise SystemExit(f"{name} cannot be measured: see above")
            rates[name] = max(rates[name], figures["per_core"])
    labels = {"ours": "plain", "ours_best_fit": "best fit", "ours_packed_anew": "best fit, packed again"}
    return {label: rates[name] / rates["litdata"] for name, label in labels.items()}


def checkpoint() -> Ratios:
    """Saves and loads against torch.distributed.checkpoint, on the disk of `runs/`."""
    from tests.bench import checkpoint

    (ROOT / "runs").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=ROOT / "runs") as folder:
        seconds, _ = checkpoint.measure(checkpoint.recipe_of(512), Path(folder), rounds=1)
    best = {name: min(values) for name, values in seconds.items()}
    return {"save": best["torch save"] / best["save"], "load": best["torch load"] / best["load"]}


MEASURES: dict[str, Callable[[], Ratios]] = {
    "train": train,
    "generate": generate,
    "experts": experts,
    "rows": rows,
    "checkpoint": checkpoint,
}


def machine_kind() -> str:
    """What the ratios depend on: maker, family and model of the processor, its widest vectors and products, its cores."""
    facts = dict(re.findall(r"^(\w[\w ]*\w)\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE))
    flags = facts["flags"].split()
    widest = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    cores = len(os.sched_getaffinity(0))
    return (
        f"{facts['vendor_id']} {facts['cpu family']}/{facts['model']}, {widest[-1] if widest else 'sse'}, {cores} cores"
    )


def ratios_of(measure: str) -> Ratios:
    """One measure in a process of its own. -> ratios by name."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    environment |= {
        "GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=1073741824:glibc.malloc.trim_threshold=1099511627776"
    }
    command = [sys.executable, "-m", "tests.bench.quick", "--child", measure]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{measure} failed (exit status {done.returncode}): see above")
    found = json.loads(done.stdout.strip().splitlines()[-1])
    return {f"{measure}: {name}": ratio for name, ratio in found.items()}


def below(found: Ratios, baselines: Ratios) -> list[str]:
    """Names of ratios more than `DROP` below their baseline, or gone."""
    return [name for name, old in baselines.items() if found.get(name, 0.0) < (1 - DROP) * old]


def best_of_tries(measure: str, baselines: Ratios) -> tuple[Ratios, int]:
    """Ratios of a measure, measured again while one is below its baseline: the best of each. -> (ratios, tries)."""
    wanted = {name: old for name, old in baselines.items() if name.startswith(f"{measure}: ")}
    best: Ratios = {}
    tries = 0
    while tries == 0 or (tries < TRIES and below(best, wanted)):
        tries += 1
        for name, ratio in ratios_of(measure).items():
            best[name] = max(ratio, best.get(name, 0.0))
    return best, tries


def store(measures: list[str], path: Path) -> None:
    """Write the median of three runs of each measure as this machine kind's baselines."""
    kinds: dict[str, Ratios] = json.loads(path.read_text()) if path.exists() else {}
    stored = kinds.setdefault(machine_kind(), {})
    for measure in measures:
        runs = [ratios_of(measure) for _ in range(3)]
        for gone in [name for name in stored if name.startswith(f"{measure}: ") and name not in runs[0]]:
            del stored[gone]  # a ratio that was renamed would be missing in every later comparison
        for name in runs[0]:
            stored[name] = round(statistics.median(run[name] for run in runs), 3)
    path.write_text(json.dumps(kinds, indent=2, sort_keys=True) + "\n")


def compare(measures: list[str], path: Path) -> int:
    """Measure, print the table, judge. -> 1 if a ratio stays below its baseline."""
    kind = machine_kind()
    kinds: dict[str, Ratios] = json.loads(path.read_text()) if path.exists() else {}
    baselines = kinds.get(kind, {})
    sys.stdout.write(
        f"{kind}, load {os.getloadavg()[0]:.1f}\n\n| ratio | measured | baseline | tries |\n|---|---|---|---|\n"
    )
    found: Ratios = {}
    for measure in measures:
        ratios, tries = best_of_tries(measure, baselines)
        found |= ratios
        for name, ratio in ratios.items():
            old = f"{baselines[name]:.2f}" if name in baselines else "none"
            sys.stdout.write(f"| {name} | {ratio:.2f} | {old} | {tries} |\n")
            sys.stdout.flush()
    if not baselines:
        sys.stdout.write(
            f"\nNo baselines for this kind of machine, nothing is judged. To add them to {path}: --store\n"
        )
        return 0
    chosen = {name: old for name, old in baselines.items() if name.partition(": ")[0] in measures}
    slower = below(found, chosen)
    for name in slower:
        sys.stdout.write(
            f"\nSLOWER: {name}: {found.get(name, 0.0):.2f} in the best of {TRIES} tries, baseline {chosen[name]:.2f}. Find the "
            "change that did it, or, if the loss is meant, store the new ratios with --store."
        )
    sys.stdout.write("\n")
    return 1 if slower else 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.quick", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=list(MEASURES), default=list(MEASURES), help="only these measures")
    parser.add_argument("--baselines", type=Path, default=BASELINES, help="file of stored ratios")
    parser.add_argument("--store", action="store_true", help="write this machine's ratios as its baselines")
    parser.add_argument("--child", choices=list(MEASURES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        sys.stdout.write("\n" + json.dumps(MEASURES[options.child]()) + "\n")
        return 0
    began = time.perf_counter()
    if options.store:
        store(options.only, options.baselines)
        return 0
    status = compare(options.only, options.baselines)
    sys.stdout.write(f"{time.perf_counter() - began:.0f} s\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
