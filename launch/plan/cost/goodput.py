"""Goodput: the useful share of a run's time if machines fail and each failure loses the work since the last save.

    train (interval) | stall | train | stall | train ... failure | restart, load | train from the newest durable save

Failures are random and memoryless (exponential). They can happen at any time, also while a save is written and during a restart,
which then starts from its beginning. A save stalls training for `stall_s`. It is written in the background and durable `write_s`
later; the next save waits for that. Let M be the mean time between failures, T the interval, d the stall, w the writing time, R
restart and loading, and c = d + max(T, w) the time from one save to the next. The i-th save is durable after
t = T + d + (i - 1) c + w. The probability that no failure happens before t is exp(-t/M). It takes M (exp(R/M) - 1) on average
until R seconds have passed without a failure. So

    goodput = T exp((c - T - d - w - R)/M) / (M (exp(c/M) - 1))

For w = 0 this is J. T. Daly's equation (Future Generation Computer Systems 22, 2006, eq. 20). `simulate` simulates the same
process event by event, without these formulas.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

LLAMA_NODE_MTBF_S = 54 * 86400 * (16384 // 8) / 419
"""Mean seconds between unexpected interruptions of a job for one node of eight H100s: 419 interruptions in 54 days on 16,384 GPUs
(arXiv 2407.21783, section 3.3.4), so 264 days."""

_MOST_RATIO = 300.0
"""Restart or cycle, in mean times between failures, that never ends: exp of twice as much is still a float."""
_DRAWN_ONE_BY_ONE = 100


@dataclass(frozen=True)
class Failures:
    """How often a job is interrupted, and how long an interruption takes."""

    mean_s: float
    """Mean time between failures of the whole job."""
    restart_s: float
    """Time from a failure until all processes run again: detection, clean-up, scheduling, start."""
    load_s: float
    """Time to read the checkpoint."""

    @property
    def downtime_s(self) -> float:
        """Time from a failure until training continues."""
        return self.restart_s + self.load_s


@dataclass(frozen=True)
class Saving:
    """When and how a run saves, in seconds."""

    interval_s: float
    """Training time between saves."""
    stall_s: float
    """Time that training waits for a save."""
    write_s: float = 0.0
    """Time from the end of the stall until the save is durable."""

    @property
    def cycle_s(self) -> float:
        """Time from one save to the next."""
        return self.stall_s + max(self.interval_s, self.write_s)


@dataclass(frozen=True)
class Outcome:
    """How a simulated run spent its time, in seconds."""

    useful: float
    stalled: float
    lost: float
    """Training that had to be repeated after a failure."""
    restarting: float
    failures: int
    error: float
    """Standard error of `goodput`, from 20 blocks of the run."""

    @property
    def elapsed(self) -> float:
        return self.useful + self.stalled + self.lost + self.restarting

    @property
    def goodput(self) -> float:
        return self.useful / self.elapsed


def expected_goodput(failures: Failures, saving: Saving) -> float:
    """Expected share of useful time of a long run, in closed form."""
    mean = failures.mean_s
    if failures.downtime_s + saving.cycle_s + saving.write_s > _MOST_RATIO * mean:
        return 0.0  # nothing ever finishes; exp would overflow
    wait = saving.cycle_s - saving.interval_s - saving.stall_s  # for the previous save; the first save does not wait
    useful = saving.interval_s * math.exp((wait - saving.write_s - failures.downtime_s) / mean)
    return useful / (mean * math.expm1(saving.cycle_s / mean))


def young_interval(failures: Failures, stall_s: float) -> float:
    """J. W. Young's interval, sqrt(2 d M) (Communications of the ACM 17, 1974)."""
    return math.sqrt(2 * stall_s * failures.mean_s)


def daly_interval(failures: Failures, stall_s: float) -> float:
    """J. T. Daly's higher-order interval (eq. 37 of the paper above), within a fraction of a percent of the optimum."""
    mean = failures.mean_s
    if stall_s >= 2 * mean:
        return mean
    part = stall_s / (2 * mean)
    return math.sqrt(2 * stall_s * mean) * (1 + math.sqrt(part) / 3 + part / 9) - stall_s


def best_interval(failures: Failures, *, stall_s: float, write_s: float) -> float:
    """The interval with the highest expected goodput: golden-section search over its logarithm (there is a single maximum)."""
    ratio = (math.sqrt(5) - 1) / 2
    low, high = math.log(1e-3), math.log(20 * failures.mean_s)

    def value(logarithm: float) -> float:
        return expected_goodput(failures, Saving(math.exp(logarithm), stall_s, write_s))

    left, right = high - ratio * (high - low), low + ratio * (high - low)
    while high - low > 1e-6:
        if value(left) < value(right):
            low, left = left, right
            right = low + ratio * (high - low)
        else:
            high, right = right, left
            left = high - ratio * (high - low)
    return math.exp((low + high) / 2)


def longest_interval(failures: Failures, *, stall_s: float, write_s: float, tolerance: float = 1e-3) -> float:
    """The longest interval whose goodput is within `tolerance` of the best. Fewer saves use less storage and network."""
    low = best_interval(failures, stall_s=stall_s, write_s=write_s)
    enough = expected_goodput(failures, Saving(low, stall_s, write_s)) - tolerance
    high = 40 * failures.mean_s
    if expected_goodput(failures, Saving(high, stall_s, write_s)) >= enough:
        return low
    for _ in range(60):
        middle = math.sqrt(low * high)
        if expected_goodput(failures, Saving(middle, stall_s, write_s)) >= enough:
            low = middle
        else:
            high = middle
    return low


def simulate(failures: Failures, saving: Saving, *, count: int = 4000, seed: int = 0) -> Outcome:
    """Simulate a run until it has failed `count` times. ValueError for an interval that is not above 0."""
    if not saving.interval_s > 0:
        raise ValueError(
            f"interval_s={saving.interval_s:g}: a run that saves all the time never trains. Use more than 0."
        )
    generator = random.Random(seed)
    blocks: list[tuple[float, float]] = []
    stalled = lost = restarting = useful = 0.0
    block_start = (0.0, 0.0)
    for number in range(1, count + 1):
        until = generator.expovariate(1 / failures.mean_s)
        life = _life(until, saving)
        durable, trained, waited = life.durable, life.trained, life.stalled
        useful, lost, stalled = useful + durable, lost + trained - durable, stalled + waited
        restarting += _restarting_s(failures, generator)
        if number % max(1, count // 20) == 0:
            elapsed = useful + lost + stalled + restarting
            blocks.append((useful - block_start[0], elapsed - block_start[1]))
            block_start = (useful, elapsed)
    shares = [done / took for done, took in blocks]
    mean = sum(shares) / len(shares)
    spread = sum((share - mean) ** 2 for share in shares) / max(1, len(shares) - 1)
    return Outcome(useful, stalled, lost, restarting, count, error=math.sqrt(spread / len(shares)))


@dataclass(frozen=True)
class _Life:
    """Training between two interruptions, in seconds."""

    durable: float
    """What was saved before the second."""
    trained: float
    stalled: float


def _life(until: float, saving: Saving) -> _Life:
    """Train, stall, train, ... for `until` seconds."""
    now = trained = waited = 0.0
    durable = 0.0
    pending: tuple[float, float] | None = None  # time at which the save is durable, training time that it contains
    while now < until:
        skipped = int((until - now) / saving.cycle_s) - 2 if pending is not None else 0
        if skipped > 0 and pending is not None:  # every cycle is the same until a failure
            now, trained = now + skipped * saving.cycle_s, trained + skipped * saving.interval_s
            waited += skipped * (saving.cycle_s - saving.interval_s)
            durable = pending[1] + (skipped - 1) * saving.interval_s
            pending = (now + saving.write_s, trained)
        work = min(saving.interval_s, until - now)
        if now + work == now:  # the interval is below the resolution of the clock: a failure every 1e16 intervals
            break
        now, trained = now + work, trained + work
        if now >= until:
            break
        ready = max(now, pending[0]) if pending is not None else now  # a save waits until the previous one is durable
        end = min(until, ready + saving.stall_s)
        waited, now = waited + end - now, end
        if now >= until:
            break
        if pending is not None:
            durable = pending[1]
        pending = (now + saving.write_s, trained)
    if pending is not None and pending[0] <= until:
        durable = pending[1]
    return _Life(durable, trained, waited)


def simulate_at(times: Sequence[float], failures: Failures, saving: Saving, *, end_s: float) -> Outcome:
    """Simulate a run that trains from time 0 on, fails at `times`, and ends at `end_s` with nothing lost.

    No chance is involved, so `failures.mean_s` is not used and the error is 0. ValueError for times that do not ascend from 0.
    """
    if [0.0, *times, end_s] != sorted([0.0, *times, end_s]):
        raise ValueError(f"failures at {list(times)} are not in order between 0 and {end_s:g} s")
    stalled = lost = restarting = useful = last = back = 0.0
    for number, at in enumerate((*times, end_s)):
        restarting += min(at, back) - last
        if at > back:
            life = _life(at - back, saving)
            kept = life.trained if number == len(times) else life.durable
            useful, lost, stalled = useful + kept, lost + life.trained - kept, stalled + life.stalled
        last, back = at, at + failures.downtime_s
    return Outcome(useful, stalled, lost, restarting, len(times), error=0.0)


def _restarting_s(failures: Failures, generator: random.Random) -> float:
    """Time from a failure until training continues. A failure during a restart begins it again.

    The number of failed attempts is drawn at once, because there are exp(R/M) of them on average: played one by one, a restart
    that takes 60 times the mean time between failures never ends. Many attempts are drawn by their sum's normal distribution.
    """
    mean, whole = failures.mean_s, failures.downtime_s
    ratio = min(whole / mean, _MOST_RATIO)
    if ratio <= 0:
        return 0.0
    attempts = int(math.log1p(-generator.random()) / math.log1p(-math.exp(-ratio)))
    share = -math.expm1(-ratio)  # of failures that come before the restart's end
    if attempts < _DRAWN_ONE_BY_ONE:
        return whole + math.fsum(-mean * math.log1p(-share * generator.random()) for _ in range(attempts))
    average = mean - whole / math.expm1(ratio)
    variance = max(0.0, mean**2 - whole**2 * math.exp(ratio) / math.expm1(ratio) ** 2)
    return whole + max(0.0, generator.gauss(attempts * average, math.sqrt(attempts * variance)))
