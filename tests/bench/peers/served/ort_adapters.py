"""Run in ONNX Runtime's environment: of models built with one adapter each, one model that takes any.

The model builder writes an adapter's matrices into the graph as constants. Here they become inputs of
the graph, which an adapter file fills when it is active, as ONNX Runtime's multi-LoRA wants it. What
the builder folded into the matrices (alpha / r) stays in them.
"""

import argparse
import shutil
from pathlib import Path

import onnx
import onnxruntime
from onnx import numpy_helper

_VERSION = 1


def is_lora(name: str) -> bool:
    """Whether a constant of the builder's graph belongs to an adapter."""
    return ".lora_A." in name or ".lora_B." in name


def matrices(built: Path) -> dict[str, onnx.TensorProto]:
    """The constants of the adapter in a built model."""
    model = onnx.load(str(built / "model.onnx"))
    return {tensor.name: tensor for tensor in model.graph.initializer if is_lora(tensor.name)}


def write_adapter(built: Path, target: Path) -> None:
    """An adapter file from a model that was built with it."""
    # The values borrow the arrays' memory, so the arrays have to outlive them.
    arrays = {name: numpy_helper.to_array(tensor) for name, tensor in matrices(built).items()}
    adapter = onnxruntime.AdapterFormat()
    adapter.set_adapter_version(_VERSION)
    adapter.set_model_version(_VERSION)
    adapter.set_parameters(
        {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()}
    )
    adapter.export_adapter(str(target))


def write_model(built: Path, target: Path) -> None:
    """The model with the adapter's matrices as inputs, with the builder's other files."""
    model = onnx.load(str(built / "model.onnx"))
    graph = model.graph
    constants = [tensor for tensor in graph.initializer if not is_lora(tensor.name)]
    for tensor in graph.initializer:
        if is_lora(tensor.name):
            shape = list(tensor.dims)
            info = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, shape)
            graph.input.append(info)
    del graph.initializer[:]
    graph.initializer.extend(constants)
    target.mkdir(parents=True)
    onnx.save(
        model,
        str(target / "model.onnx"),
        save_as_external_data=True,
        location="model.onnx.data",
    )
    for path in built.iterdir():
        if not path.name.startswith("model.onnx"):
            shutil.copy(path, target)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--built", action="append", required=True, help="NAME=PATH")
    parser.add_argument("--target", type=Path, required=True)
    given = parser.parse_args()
    built = {name: Path(path) for name, path in (pair.split("=", 1) for pair in given.built)}
    write_model(next(iter(built.values())), given.target)
    for name, path in built.items():
        write_adapter(path, given.target / f"{name}.onnx_adapter")
