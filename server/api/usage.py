"""Token counts of one HTTP request, over all of its prompts."""

from openai.types import CompletionUsage
from openai.types.completion_usage import PromptTokensDetails

from server.api.generation import IndexedOutput


class UsageTally:
    """Keeps each prompt's latest totals. A prompt counts once, however large `n` is."""

    def __init__(self, prompt_lengths: list[int]) -> None:
        self._num_prompt = sum(prompt_lengths)
        self._num_output = [0] * len(prompt_lengths)
        self._num_cached = [0] * len(prompt_lengths)

    def add(self, indexed: IndexedOutput) -> None:
        """Note what an output says of its request's totals so far."""
        index, output = indexed
        self._num_output[index] = output.num_output_tokens
        self._num_cached[index] = output.num_cached_tokens

    def total(self) -> CompletionUsage:
        """The counts in OpenAI's shape."""
        num_output = sum(self._num_output)
        return CompletionUsage(
            prompt_tokens=self._num_prompt,
            completion_tokens=num_output,
            total_tokens=self._num_prompt + num_output,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=sum(self._num_cached)),
        )
