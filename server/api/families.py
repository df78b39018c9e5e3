"""Metric families in Prometheus's format, made when they are read.

Every one carries `model_name` and `engine`, as vLLM's do; there is one engine, number 0.
"""

from collections.abc import Mapping

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from server.engine.distribution import Distribution

LABELS = ("model_name", "engine")

_Kind = type[GaugeMetricFamily] | type[CounterMetricFamily]


class Families:
    """Families of one model."""

    def __init__(self, model_name: str) -> None:
        self._values = [model_name, "0"]

    def gauge(self, name: str, text: str, value: float) -> Metric:
        """One figure that goes up and down."""
        return self._one(GaugeMetricFamily, name, text, value)

    def gauges(self, name: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
        """One for each value of a label."""
        return self._each(GaugeMetricFamily, name, text, label, values)

    def counter(self, name: str, text: str, value: float) -> Metric:
        """One figure that only grows; `name` without `_total`."""
        return self._one(CounterMetricFamily, name, text, value)

    def counters(self, name: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
        """One for each value of a label."""
        return self._each(CounterMetricFamily, name, text, label, values)

    def _one(self, kind: _Kind, name: str, text: str, value: float) -> Metric:
        family = kind(name, text, labels=LABELS)
        family.add_metric(self._values, value)
        return family

    def _each(
        self, kind: _Kind, name: str, text: str, label: str, values: Mapping[str, float]
    ) -> Metric:
        family = kind(name, text, labels=[*LABELS, label])
        for key, value in values.items():
            family.add_metric([*self._values, key], value)
        return family

    def histogram(self, name: str, text: str, distribution: Distribution) -> Metric:
        """A distribution."""
        family = HistogramMetricFamily(name, text, labels=LABELS)
        self._add(family, self._values, distribution)
        return family

    def histograms(
        self, name: str, text: str, label: str, distributions: Mapping[str, Distribution]
    ) -> Metric:
        """One for each value of a label."""
        family = HistogramMetricFamily(name, text, labels=[*LABELS, label])
        for key, distribution in distributions.items():
            self._add(family, [*self._values, key], distribution)
        return family

    @staticmethod
    def _add(family: HistogramMetricFamily, values: list[str], distribution: Distribution) -> None:
        num_so_far = 0
        buckets = []
        bounds = (*(str(float(bound)) for bound in distribution.bounds), "+Inf")
        for bound, num in zip(bounds, distribution.counts(), strict=True):
            num_so_far += num
            buckets.append((bound, num_so_far))
        family.add_metric(values, buckets, sum_value=distribution.total)
