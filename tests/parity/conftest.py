"""Models, adapters and oracles on disk, made once a session."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests.parity.adapters import save_adapter
from tests.parity.oracle import Oracle
from tests.parity.zoo import BY_NAME, save_model

ModelPath = Callable[[str], Path]
AdapterPath = Callable[..., Path]
OracleOf = Callable[..., Oracle]


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> ModelPath:
    """Directory of the zoo's model of this name."""
    root = tmp_path_factory.mktemp("models")
    return cache(lambda name: save_model(BY_NAME[name], root / name))


@pytest.fixture(scope="session")
def adapter_path(tmp_path_factory: pytest.TempPathFactory) -> AdapterPath:
    """Directory of an adapter for the zoo's model: (architecture name, variant, seed, rank)."""
    root = tmp_path_factory.mktemp("adapters")

    @cache
    def path(architecture: str, variant: str, seed: int = 0, rank: int = 4) -> Path:
        directory = root / f"{architecture}-{variant}-{seed}-{rank}"
        return save_adapter(BY_NAME[architecture], variant, directory, seed=seed, rank=rank)

    return path


@pytest.fixture(scope="session")
def oracle_of(model_path: ModelPath, adapter_path: AdapterPath) -> OracleOf:
    """PEFT's answer for (architecture name, variant or None for the base, seed, rank)."""

    @cache
    def oracle(
        architecture: str, variant: str | None = None, seed: int = 0, rank: int = 4
    ) -> Oracle:
        adapter = None if variant is None else adapter_path(architecture, variant, seed, rank)
        return Oracle(model_path(architecture), adapter)

    return oracle
