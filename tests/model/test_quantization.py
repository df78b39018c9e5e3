"""Which Linears become int8, what that is called, what is refused, and products without the kernel."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from boundary.record import FILE_NAME, BoundaryRecord, write
from server.errors import ModelError
from server.model import int8_product, loader, packed, prepare, quantization
from server.model.checkpoint import read_checkpoint
from server.model.int8_product import Int8Product
from server.model.loader import LoadedModel
from server.model.packed import PackedLinear
from server.model.targets import Targets
from tests.parity.generation import generate, greedy, open_core
from tests.parity.zoo import NUM_LAYERS, random_prompt
from tests.tiny import Tiny

PROMPT = random_prompt(9, seed=1)


def load(path: Path, dtype: str = "float32", quantized: Any = "int8") -> LoadedModel:
    return loader.load(str(path), None, "cpu", dtype, quantization=quantized)


class TestWithoutTorchao:
    @pytest.fixture
    def installed(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[str | None], None]:
        def set_version(found: str | None) -> None:
            def version(name: str) -> str:
                assert name == "torchao"
                if found is None:
                    raise quantization.PackageNotFoundError(name)
                return found

            monkeypatch.setattr(quantization, "version", version)

        return set_version

    @pytest.mark.parametrize(
        ("found", "says"),
        [
            (None, "needs torchao: pip install 'fathom-lora[int8]'"),
            ("0.17.0", "needs torchao 0.18 or later, found 0.17.0: pip install -U"),
        ],
    )
    def test_a_load_says_what_to_install_before_it_reads_weights(
        self, tiny: Tiny, installed: Callable[[str | None], None], found: str | None, says: str
    ) -> None:
        installed(found)
        stages: list[str] = []
        with pytest.raises(ModelError) as refused:
            loader.load(
                str(tiny.model_path), None, "cpu", "float32",
                lambda stage, done, total: stages.append(stage), "int8",
            )  # fmt: skip
        assert says in refused.value.message
        assert refused.value.param == "quantization"
        assert stages == []
        load(tiny.model_path, quantized="none")  # needs none


def test_the_base_is_called_by_its_quantization(tiny: Tiny) -> None:
    """Which is part of what records and cached blocks are known by."""
    revision = load(tiny.model_path).revision
    assert revision == f"{tiny.base.revision}-int8"
    assert load(tiny.model_path, "bfloat16").revision == revision  # as without int8


@pytest.mark.parametrize("made_for", ["none", "int8"])
def test_a_boundary_counts_for_the_base_it_was_made_with_alone(
    tiny: Tiny, tmp_path: Path, made_for: str
) -> None:
    adapter = tmp_path / "a"
    adapter.mkdir()
    for file in tiny.adapter("a").iterdir():
        (adapter / file.name).write_bytes(file.read_bytes())
    digest = read_checkpoint(adapter, tiny.targets).digest
    base = tiny.base.revision + quantization.REVISION_ENDING[made_for]  # type: ignore[index]
    record = BoundaryRecord.pinned(2, NUM_LAYERS, "tried", base=base, adapter=digest)
    write(record, adapter / FILE_NAME)
    for served in ("none", "int8"):
        with open_core(tiny.model_path, quantization=served) as core:
            ref = core.registry.load("x", adapter)
            selected = core.registry.depths.resolve(ref, "auto")
        if served == made_for:
            assert (selected.depth, selected.source) == (2, "calibrated")
        else:
            assert selected.source == "full"
            assert f"made for base model {base}" in str(ref.boundary_error)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.inference_mode()
def test_what_int8_saves_is_what_it_says(tiny: Tiny, dtype: torch.dtype) -> None:
    model = copy.deepcopy(tiny.base.model).to(dtype)
    targets = Targets(model)
    linears = quantization.linears_of(targets)
    before = sum(module.weight.nbytes for module in linears)
    saved = quantization.quantize(model, targets)
    weights = [quantization.read(module) for module in linears]
    assert len(weights) == 7 * NUM_LAYERS
    assert before - saved == sum(one.values.nbytes + one.scales.nbytes for one in weights)
    assert type(model.get_output_embeddings().weight) is nn.Parameter
    with pytest.raises(ModelError, match="are quantized already"):
        quantization.quantize(model, targets)


def pair(dtype: torch.dtype, *, bias: bool) -> tuple[list[nn.Linear], list[nn.Linear]]:
    """torchao's Linears of one input, and the same packed as one product."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    torch.manual_seed(0)
    theirs = nn.ModuleList(nn.Linear(24, n, bias=bias, dtype=dtype) for n in (40, 16, 8))
    quantize_(theirs, Int8WeightOnlyConfig(set_inductor_config=False))
    ours = copy.deepcopy(theirs)
    assert packed.pack(ours, [list(ours)]) == 3  # type: ignore[arg-type]
    return list(theirs), list(ours)  # type: ignore[arg-type]


@pytest.mark.parametrize("has_kernel", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.inference_mode()
def test_linears_of_one_input_are_one_product(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, bias: bool, has_kernel: bool
) -> None:
    if not has_kernel:
        monkeypatch.setattr(int8_product, "native_int8_product", lambda *_: None)
    theirs, ours = pair(dtype, bias=bias)
    assert len({id(module.product) for module in ours}) == 1  # type: ignore[attr-defined]
    for module, other in zip(ours, theirs, strict=True):
        assert isinstance(module, PackedLinear)
        assert isinstance(module.product, Int8Product)
        assert (module.product._native is not None) is has_kernel
        assert torch.equal(module.weight, other.weight.dequantize())
    tolerance = 1e-5 if dtype is torch.float32 else 2e-2
    for shape in [(), (0,), (1,), (1, 7), (2, 16)]:
        x = torch.randn(*shape, 24, dtype=dtype)
        for module, other in zip(ours, theirs, strict=True):
            y = module(x)
            assert (y.shape, y.dtype) == ((*shape, module.out_features), dtype)
            if y.numel():
                torch.testing.assert_close(
                    y, other(x[None])[0], rtol=tolerance, atol=tolerance, check_stride=False
                )


@torch.inference_mode()
def test_another_kind_of_quantization_is_not_read() -> None:
    from torchao.quantization import (
        Int8DynamicActivationInt8WeightConfig,
        Int8WeightOnlyConfig,
        PerTensor,
        quantize_,
    )

    for config in (
        Int8DynamicActivationInt8WeightConfig(set_inductor_config=False),
        Int8WeightOnlyConfig(granularity=PerTensor(), set_inductor_config=False),
    ):
        module = nn.Linear(32, 32)
        quantize_(module, config)
        with pytest.raises(ModelError, match="of a kind that is not served"):
            quantization.read(module)


def test_without_packing_torchao_s_own_forward_serves(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a CUDA device, and on a CPU whose torch cannot pack."""

    def generated() -> dict[str, Any]:
        with open_core(tiny.model_path, quantization="int8") as core:
            for name in ("a", "b"):
                core.registry.load(name, tiny.adapter(name))
            return generate(
                core,
                [
                    greedy(f"{name} {depth}", PROMPT, core.registry.select(name, depth), 6)
                    for name in ("a", "b")
                    for depth in (0, 2, NUM_LAYERS)
                ],
            )

    expected = generated()
    monkeypatch.setattr(prepare.packed, "is_available", lambda device, dtype: False)
    for key, own in generated().items():
        assert own.token_ids == expected[key].token_ids
        torch.testing.assert_close(own.logits, expected[key].logits, rtol=0, atol=1e-4)
