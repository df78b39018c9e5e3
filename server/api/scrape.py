"""The registry that Prometheus scrapes."""

from prometheus_client import CollectorRegistry
from prometheus_client.gc_collector import GCCollector
from prometheus_client.process_collector import ProcessCollector

from server.access.service import Access
from server.api.connection_metrics import ConnectionCollector
from server.api.engine_metrics import EngineCollector
from server.api.metrics import Metrics
from server.api.request_metrics import RequestCollector
from server.api.store_metrics import StoreCollector
from server.calibration.service import CalibrationService
from server.config import Settings
from server.connections import Connections
from server.engine.protocol import Engine


def metrics_registry(
    engine: Engine,
    settings: Settings,
    metrics: Metrics,
    access: Access,
    calibration: CalibrationService,
    connections: Connections | None,
) -> CollectorRegistry:
    """One registry for one server: the engine's figures, the requests', the store's, the sockets' and the
    process's.
    """
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    GCCollector(registry=registry)
    registry.register(EngineCollector(engine, settings))
    registry.register(RequestCollector(metrics, engine.info.name, settings.max_loras))
    registry.register(StoreCollector(access, calibration, engine.info.name))
    if connections is not None:
        registry.register(ConnectionCollector(connections, engine.info.name))
    return registry
