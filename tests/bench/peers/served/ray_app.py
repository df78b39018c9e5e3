"""Run in Ray's environment: Ray Serve in front of PEFT's mixed batch, as its users write it.

`@serve.batch` gathers up to 16 requests, and a batch's rows have adapters of their own by
`adapter_names`. A static batch gives its tokens when it is done, so the stream is one event. Everything
listens on the loopback address.
"""

import argparse
import json
import signal
import warnings
from typing import Any

import ray
import torch
from peft import PeftModel
from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from transformers import AutoModelForCausalLM, GenerationConfig

MAX_BATCH = 16
BASE = "base"
_QUIET_S = 0.005
_NUM_THREADS = 2


@serve.deployment(max_ongoing_requests=64, ray_actor_options={"num_cpus": 1})
class Completions:
    """One replica with the model and all adapters."""

    def __init__(self, model: str, adapters: dict[str, str]) -> None:
        torch.set_num_threads(_NUM_THREADS)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.float32, attn_implementation="sdpa"
        )
        loaded.generation_config = GenerationConfig(pad_token_id=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for name, path in adapters.items():
                if isinstance(loaded, PeftModel):
                    loaded.load_adapter(path, adapter_name=name)
                else:
                    loaded = PeftModel.from_pretrained(loaded, path, adapter_name=name)
        self._model = loaded.eval()

    async def __call__(self, request: Request) -> Response:
        """`/health`, and `/v1/completions` with token ids as the prompt."""
        if request.url.path == "/health":
            return JSONResponse({"status": "ok"})
        body = await request.json()
        tokens = await self.complete((body["prompt"], body["max_tokens"], body["model"]))
        text = " ".join(f"w{token}" for token in tokens)
        event = {"choices": [{"text": text}], "usage": {"completion_tokens": len(tokens)}}
        return Response(
            f"data: {json.dumps(event)}\n\ndata: [DONE]\n\n", media_type="text/event-stream"
        )

    @serve.batch(max_batch_size=MAX_BATCH, batch_wait_timeout_s=_QUIET_S)
    async def complete(self, batch: list[tuple[list[int], int, str]]) -> list[list[int]]:
        """Greedy tokens of each; prompts of one batch have one length here."""
        prompts = torch.tensor([prompt for prompt, _, _ in batch])
        max_tokens = max(wanted for _, wanted, _ in batch)
        names = ["__base__" if model == BASE else model for _, _, model in batch]
        chosen: dict[str, Any] = {} if set(names) == {"__base__"} else {"adapter_names": names}
        config = GenerationConfig(do_sample=False, max_new_tokens=max_tokens, pad_token_id=0)
        with torch.inference_mode():
            if chosen:
                output = self._generate(prompts, config, **chosen)
            else:
                with self._model.disable_adapter():
                    output = self._generate(prompts, config)
        rows = output[:, prompts.shape[1] :].tolist()
        return [row[:wanted] for row, (_, wanted, _) in zip(rows, batch, strict=True)]

    def _generate(self, prompts: torch.Tensor, config: GenerationConfig, **chosen: Any) -> Any:
        mask = torch.ones_like(prompts)
        return self._model.generate(
            input_ids=prompts, attention_mask=mask, generation_config=config, **chosen
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--adapter", action="append", default=[], help="NAME=PATH")
    parser.add_argument("--port", type=int, required=True)
    given = parser.parse_args()
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        _node_ip_address="127.0.0.1",
        object_store_memory=1 << 28,
    )
    serve.start(http_options={"host": "127.0.0.1", "port": given.port})
    adapters = dict(pair.split("=", 1) for pair in given.adapter)
    serve.run(Completions.bind(given.model, adapters), route_prefix="/")
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    ray.shutdown()
