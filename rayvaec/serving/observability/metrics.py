"""Prometheus metrics, aggregated over all replicas."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Metric,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

TEXT = "text/plain; version=0.0.4; charset=utf-8"
"""Media type of Prometheus' text form."""

OTHER = "other"
"""Stands for every address that is no route, of which there may be any number."""

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Metrics:
    """The counts of one replica.

    Parameters
    ----------
    replica : str
        Its name, a label of every value.
    in_work : callable
        Returns the number of requests that are at work or waiting.
    held_bytes : callable
        Returns the bytes that they hold.
    waiting_for_clients : callable
        Returns the number of answers whose clients have yet to read what was sent.
    jobs_waiting : callable
        Returns the number of jobs, parts of requests, that wait for the sampler.
    """

    def __init__(
        self,
        *,
        replica: str,
        in_work: Callable[[], int],
        held_bytes: Callable[[], int],
        waiting_for_clients: Callable[[], int],
        jobs_waiting: Callable[[], int],
    ) -> None:
        self._replica = replica
        self._registry = registry = CollectorRegistry()
        self._requests = Counter(
            "rayvaec_requests", "Requests answered", ["route", "status"], registry=registry
        )
        self._seconds = Histogram(
            "rayvaec_request_seconds",
            "Time from a request to the last byte of its answer",
            ["route"],
            registry=registry,
            buckets=_SECONDS,
        )
        self._draws = Counter(
            "rayvaec_draws", "Draws (cells * n_samples) answered", ["route"], registry=registry
        )
        self._rejected = Counter(
            "rayvaec_rejected", "Requests refused, by reason", ["reason"], registry=registry
        )
        for name, words, count in (
            ("rayvaec_requests_in_work", "Requests at work or waiting", in_work),
            ("rayvaec_held_bytes", "Bytes that requests at work hold", held_bytes),
            (
                "rayvaec_answers_unread",
                "Answers whose clients have yet to read what was sent",
                waiting_for_clients,
            ),
            ("rayvaec_jobs_waiting", "Parts of requests that wait for the sampler", jobs_waiting),
        ):
            Gauge(name, words, registry=registry).set_function(count)
        ProcessCollector(registry=registry)

    def count(self, route: str, status: int, seconds: float, draws: int, reason: str) -> None:
        """Take in an answered request.

        Parameters
        ----------
        route : str
            Its address, or `OTHER`.
        status : int
            Of the answer.
        seconds : float
            How long it took.
        draws : int
            cells * n_samples of an answer with draws or moments.
        reason : str
            Why it was refused, empty where it was not.
        """
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)
        if reason:
            self._rejected.labels(reason).inc()
        elif draws:
            self._draws.labels(route).inc(draws)

    def collect(self) -> list[Metric]:
        """Return all values but the times of their first, labelled with the replica."""
        labelled = list(self._registry.collect())
        for metric in labelled:
            metric.samples = [
                Sample(s.name, {"replica": self._replica, **s.labels}, s.value)
                for s in metric.samples
                if not s.name.endswith("_created")
            ]
        return labelled


def page(replicas: Iterable[Sequence[Metric]]) -> bytes:
    """Write the values of all replicas in Prometheus' text form.

    Parameters
    ----------
    replicas : iterable of sequences of Metric
        From each replica's `Metrics.collect`.

    Returns
    -------
    bytes
    """
    merged: dict[str, Metric] = {}
    for metrics in replicas:
        for metric in metrics:
            merged.setdefault(
                metric.name, Metric(metric.name, metric.documentation, metric.type)
            ).samples.extend(metric.samples)
    return generate_latest(_Given(list(merged.values())))


class _Given(Collector):
    """Metrics that are collected already."""

    def __init__(self, metrics: Sequence[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        yield from self._metrics
