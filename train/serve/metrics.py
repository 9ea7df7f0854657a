"""Prometheus metrics of the server and its engine, in a separate registry."""

from collections.abc import Iterable

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from train.serve.worker import Worker

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)


class _EngineMetrics:
    """Reads the engine's counts each time the page is read."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def collect(self) -> Iterable[Metric]:
        stats = self._worker.stats
        for name, help, value in (
            ("requests_running", "Requests in the running batch.", stats.running),
            ("requests_waiting", "Requests that wait for memory or a row.", stats.waiting),
            ("requests_open", "Requests that are not fully answered yet.", self._worker.open_requests),
            ("prefix_cache_blocks", "Blocks in the prefix cache.", stats.prefix_blocks),
            ("prefix_cache_hit_ratio", "Share of prompt tokens that were found in the prefix cache.", stats.hit_rate),
            ("speculation_acceptance_ratio", "Share of guesses that became tokens.", stats.acceptance_rate),
            (
                "speculation_tokens_per_step",
                "Tokens that a text gets in a step that gives it any.",
                stats.tokens_per_step,
            ),
        ):
            yield GaugeMetricFamily(f"stratum_{name}", help, value)
        for name, help, value in (
            ("prompt_tokens", "Prompt tokens.", stats.prompt_tokens),
            ("cached_prompt_tokens", "Prompt tokens that were found in the prefix cache.", stats.cached_tokens),
            ("generated_tokens", "Tokens generated.", stats.generated_tokens),
            ("guessed_tokens", "Guesses that were checked.", stats.guessed_tokens),
            ("accepted_tokens", "Guesses that became tokens.", stats.accepted_tokens),
            ("preemptions", "Times a running request had to wait again for lack of memory.", stats.preemptions),
            ("steps", "Forward passes.", stats.steps),
        ):
            yield CounterMetricFamily(f"stratum_{name}", help, value)
        pages = GaugeMetricFamily("stratum_free_pages", "Free pages of keys and values.", labels=["layers"])
        for kind, free in stats.free_pages.items():
            pages.add_metric([kind], free)
        yield pages


class Metrics:
    """The page that Prometheus reads, and the durations of calls."""

    def __init__(self, worker: Worker) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineMetrics(worker))  # type: ignore[arg-type]
        self._first = Histogram(
            "stratum_time_to_first_token_seconds",
            "Time from the call to its first token.",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._whole = Histogram(
            "stratum_request_seconds",
            "Time from the call to its last token.",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._typical_s = 1.0

    def first_token(self, seconds: float) -> None:
        self._first.observe(seconds)

    def request_done(self, seconds: float) -> None:
        self._whole.observe(seconds)
        self._typical_s += 0.1 * (seconds - self._typical_s)

    def retry_s(self) -> int:
        """Seconds after which a refused client should try again: the recent duration of a call, 1 to 60."""
        return max(1, min(60, round(self._typical_s)))

    def page(self) -> tuple[bytes, str]:
        """The page's content and its media type."""
        return generate_latest(self._registry), CONTENT_TYPE_LATEST
