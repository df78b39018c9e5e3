"""Run in OpenVINO's environment: OpenVINO GenAI behind the thin HTTP layer.

Float32 throughout: by itself it would compute in bfloat16 and quantize keys and values. Base requests
go to a pipeline without adapters, since one with adapters pays for them in base requests too.
"""

import argparse
import os

import layer
import numpy as np
import openvino
import openvino_genai

_PRECISION = {
    "INFERENCE_PRECISION_HINT": "f32",
    "KV_CACHE_PRECISION": "f32",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
    "ATTENTION_BACKEND": "PA",
}
_NO_SUCH_TOKEN = 2**31 - 1
"""The library refuses a configuration without an end of text."""


class Pipelines:
    """One for base requests, one for each adapter's; `scaling` is alpha / r, which it does not read."""

    def __init__(self, model: str, adapters: dict[str, str], scaling: float) -> None:
        self._scaling = scaling
        self._adapters = {
            name: openvino_genai.Adapter(os.path.join(path, "adapter_model.safetensors"))
            for name, path in adapters.items()
        }
        self._base = openvino_genai.LLMPipeline(model, "CPU", **_PRECISION)
        config = openvino_genai.AdapterConfig(list(self._adapters.values()))
        self._adapted = openvino_genai.LLMPipeline(model, "CPU", adapters=config, **_PRECISION)

    def complete(
        self, prompts: list[list[int]], max_tokens: int, adapter: str | None
    ) -> list[list[int]]:
        """See `layer.Complete`."""
        ids = np.array(prompts, dtype=np.int64)
        inputs = openvino_genai.TokenizedInputs(
            openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids))
        )
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = max_tokens
        config.do_sample = False
        config.ignore_eos = True
        config.eos_token_id = _NO_SUCH_TOKEN
        config.stop_token_ids = {_NO_SUCH_TOKEN}
        if adapter is None:
            return [list(tokens) for tokens in self._base.generate(inputs, config).tokens]
        config.adapters = openvino_genai.AdapterConfig([(self._adapters[adapter], self._scaling)])
        return [list(tokens) for tokens in self._adapted.generate(inputs, config).tokens]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--adapter", action="append", default=[], help="NAME=PATH")
    parser.add_argument("--scaling", type=float, required=True)
    parser.add_argument("--port", type=int, required=True)
    given = parser.parse_args()
    adapters = dict(pair.split("=", 1) for pair in given.adapter)
    layer.serve(Pipelines(given.model, adapters, given.scaling).complete, given.port)
