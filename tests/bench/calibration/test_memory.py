"""A smaller limit is a smaller peak, below the stated bound."""

import pytest
from peft import PeftModel

from server.bench.calibration.memory import MAX_LOGITS, bound_bytes, measure_memory
from server.bench.calibration.sides import adapted, random_samples, save
from server.bench.shape import parse_shape

SHAPE = parse_shape("3x64:intermediate=96:vocab=50")
SAMPLES = random_samples(8, 24, 8, 50, seed=0)
LONGEST, NUM_DEPTHS = 32, 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PeftModel:
    return adapted(*save(SHAPE, tmp_path_factory.mktemp("model"), rank=4, seed=0))


def test_peaks_follow_the_limit_and_stay_below_the_bound(model: PeftModel) -> None:
    everything = len(SAMPLES) * NUM_DEPTHS * LONGEST
    whole, half = (
        measure_memory(model, SHAPE, SAMPLES, limit) for limit in (everything, everything // 2)
    )
    assert 0.45 < half.peak_bytes / whole.peak_bytes < 0.6
    for one in (whole, half):
        assert one.is_within
        assert one.layer_evaluations == (3 + 3) / (2 * 3 + 2)
    assert whole.bound_bytes - 16 * MAX_LOGITS == everything * 4 * (12 * 64 + 4 * 96 + 2 * LONGEST)


def test_samples_in_parts_repeat_the_layers_they_share(model: PeftModel) -> None:
    found = measure_memory(model, SHAPE, SAMPLES, 1)
    assert found.layer_evaluations == 1  # a depth a pass
    assert found.bound_bytes == bound_bytes(SHAPE, LONGEST, LONGEST, 4)
    assert found.is_within
