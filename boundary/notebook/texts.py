"""Greedy texts of a PEFT model at a depth, by `model.generate`: for metrics of text, and to look at.

Prompts of similar length share a batch, padded on the left. A text is the same in any batch. Called by
`calibrate`.
"""

from collections import defaultdict
from collections.abc import Generator, Mapping, Sequence

import torch
from peft import PeftModel
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from boundary.dataset import Sample
from boundary.depth import lora_depth
from boundary.progress import Progress

BATCH_SIZE = 16

Place = tuple[int, int]
"""A sample's index and a depth."""


class Texts:
    """Texts of one list of samples by sample and depth, none written twice.

    max_tokens: of each text at most, or less where the context of `max_len` has no room for it.
    """

    def __init__(
        self,
        model: PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        samples: Sequence[Sample],
        max_tokens: int,
        max_len: int,
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._samples = samples
        self._max_tokens = max_tokens
        self._max_len = max_len
        self._texts: dict[Place, str] = {}

    def at(
        self, places: Sequence[Place], stage: str
    ) -> Generator[Progress, None, Mapping[Place, str]]:
        """The text of each place, among others; one batch a slice."""
        new = [place for place in dict.fromkeys(places) if place not in self._texts]
        yield Progress(stage, 0, len(new))
        done = 0
        # One room for all of a batch, lest a text's end depend on its neighbours.
        groups: dict[tuple[int, int], list[int]] = defaultdict(list)
        for index, depth in new:
            groups[depth, self._room(index)].append(index)
        for (depth, room), indices in groups.items():
            indices.sort(key=self._prompt_len)
            for start in range(0, len(indices), BATCH_SIZE):
                batch = indices[start : start + BATCH_SIZE]
                written = self._written(batch, depth, room)
                for index, text in zip(batch, written, strict=True):
                    self._texts[index, depth] = text
                done += len(batch)
                yield Progress(stage, done, len(new))
        return self._texts

    @torch.inference_mode()
    def _written(self, indices: Sequence[int], depth: int, room: int) -> list[str]:
        prompts = [list(self._samples[index].prompt_token_ids) for index in indices]
        longest = max(map(len, prompts))
        pad, ends = self._pad, self._ends
        padding = [longest - len(prompt) for prompt in prompts]
        rows = [[pad] * missing + prompt for missing, prompt in zip(padding, prompts, strict=True)]
        is_token = [[0] * missing + [1] * (longest - missing) for missing in padding]
        # Every setting that would change a greedy text, lest the model's own come in.
        config = GenerationConfig(  # type: ignore[no-untyped-call]
            max_new_tokens=room,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            pad_token_id=pad,
            eos_token_id=ends,
        )
        device = self._model.device
        with lora_depth(self._model, depth):
            output: Tensor = self._model.generate(  # type: ignore[no-untyped-call]
                input_ids=torch.tensor(rows, device=device),
                attention_mask=torch.tensor(is_token, device=device),
                generation_config=config,
            )
        return [
            self._text(prompt, row[longest:])
            for prompt, row in zip(prompts, output.tolist(), strict=True)
        ]

    def _text(self, prompt: list[int], following: list[int]) -> str:
        """What the tokens add to the prompt's own text; many tokenizers decode a text's start otherwise."""
        end = next((i for i, token_id in enumerate(following) if token_id in self._ends), None)
        before, whole, alone = (
            str(self._tokenizer.decode(ids, skip_special_tokens=True))
            for ids in (prompt, prompt + following[:end], following[:end])
        )
        # A prompt that ends within a character is not how the whole begins.
        return whole.removeprefix(before) if whole.startswith(before) else alone

    def _prompt_len(self, index: int) -> int:
        return len(self._samples[index].prompt_token_ids)

    def _room(self, index: int) -> int:
        """Tokens that this sample's text may have. Samples leave at least a completion's."""
        return max(1, min(self._max_tokens, self._max_len - self._prompt_len(index)))

    @property
    def _ends(self) -> list[int]:
        """Every id that ends a text, of the generation config and the tokenizer; perhaps none."""
        found: set[int] = set()
        for ids in (self._model.generation_config.eos_token_id, self._tokenizer.eos_token_id):
            if ids is not None:
                found.update([ids] if isinstance(ids, int) else ids)
        return sorted(found)

    @property
    def _pad(self) -> int:
        """An id for places that nobody looks at."""
        pad = self._tokenizer.pad_token_id
        return int(pad) if isinstance(pad, int) else 0
