"""Run in ONNX Runtime's environment: ONNX Runtime GenAI behind the thin HTTP layer.

Base requests go to the model that was built without adapters; the others to the one that takes any,
with one adapter active for the whole batch.
"""

import argparse
import os

import layer
import numpy as np
import onnxruntime_genai as genai


class Models:
    """The base model, and beside it the one with its adapters."""

    def __init__(self, base: str, adapted: str, names: list[str]) -> None:
        self._base = genai.Model(base)
        self._adapted = genai.Model(adapted)
        self._adapters = genai.Adapters(self._adapted)
        for name in names:
            self._adapters.load(os.path.join(adapted, f"{name}.onnx_adapter"), name)

    def complete(
        self, prompts: list[list[int]], max_tokens: int, adapter: str | None
    ) -> list[list[int]]:
        """See `layer.Complete`; the least length forbids the token that would end a text."""
        model = self._base if adapter is None else self._adapted
        prompt_len = len(prompts[0])
        params = genai.GeneratorParams(model)
        length = prompt_len + max_tokens
        params.set_search_options(
            do_sample=False, min_length=length, max_length=length, batch_size=len(prompts)
        )
        generator = genai.Generator(model, params)
        if adapter is not None:
            generator.set_active_adapter(self._adapters, adapter)
        generator.append_tokens(np.array(prompts, dtype=np.int32))
        for _ in range(max_tokens):
            generator.generate_next_token()
        return [
            [int(token) for token in generator.get_sequence(row)[prompt_len:]]
            for row in range(len(prompts))
        ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--base", required=True)
    parser.add_argument("--adapted", required=True)
    parser.add_argument("--adapter", action="append", default=[], help="a name")
    parser.add_argument("--port", type=int, required=True)
    given = parser.parse_args()
    layer.serve(Models(given.base, given.adapted, given.adapter).complete, given.port)
