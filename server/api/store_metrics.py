"""Families of what the server keeps in its database, and of whether that works; none without one."""

from collections.abc import Iterator

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from server.access.service import Access
from server.api.families import Families
from server.calibration.service import CalibrationService


class StoreCollector(Collector):
    """Reads what follows and fills the store; on whichever thread is asked."""

    def __init__(self, access: Access, calibration: CalibrationService, model_name: str) -> None:
        self._access = access
        self._calibration = calibration
        self._families = Families(model_name)

    def collect(self) -> Iterator[Metric]:
        """One family a figure."""
        depths = self._calibration.trouble
        if depths is None:
            return
        make, ledger = self._families, self._access.ledger
        troubles = {
            "depths": depths,
            "keys": self._access.keyring.database_trouble,
            "usage": ledger.trouble,
        }
        works = {work: float(not trouble.is_on) for work, trouble in troubles.items()}
        yield make.gauges("fathom_store_up", "1 where the last try worked.", "work", works)
        yield make.counter(
            "fathom_usage_written_requests", "Counted in the store.", ledger.num_written
        )
        yield make.gauge(
            "fathom_usage_unwritten_requests", "Counted, not stored yet.", ledger.num_unwritten
        )
