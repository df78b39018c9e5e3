"""Families of a server's connections, read when somebody asks."""

from collections.abc import Iterator

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from server.api.families import Families
from server.connections import Connections


class ConnectionCollector(Collector):
    """Reads `Connections`; on whichever thread is asked."""

    def __init__(self, connections: Connections, model_name: str) -> None:
        self._connections = connections
        self._families = Families(model_name)

    def collect(self) -> Iterator[Metric]:
        """One family a figure."""
        seen, make = self._connections, self._families
        yield make.gauge("fathom_connections", "Connections that are open.", seen.num_open)
        yield make.gauge("fathom_connections_max", "Connections served at once.", seen.most)
        yield make.counter(
            "fathom_connections_refused", "Connections answered 503.", seen.num_refused
        )
