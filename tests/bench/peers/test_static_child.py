"""The child that runs static batches: started as the bench starts it, asked by pipe."""

import json
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from tests.bench.peers.served import static_child
from tests.parity.zoo import BY_NAME, save_model


def test_it_completes_what_it_is_asked(tmp_path: Path) -> None:
    save_model(BY_NAME["llama"], tmp_path)
    prompts = [[5, 6, 7], [8, 9, 10, 11]]
    request = {"items": [[prompt, 4, None] for prompt in prompts], "batch": 2}
    done = subprocess.run(
        [sys.executable, static_child.__file__, "--model", str(tmp_path)],
        input=json.dumps(request) + "\n",
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    ready, answer = map(json.loads, done.stdout.splitlines())
    assert ready == {"is_ready": True}
    assert answer["duration_s"] > 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    for prompt, completion in zip(prompts, answer["completions"], strict=True):
        token_ids = list(prompt)
        for _ in range(4):
            with torch.inference_mode():
                token_ids.append(int(model(torch.tensor([token_ids])).logits[0, -1].argmax()))
        assert completion == token_ids[len(prompt) :]
