"""A byte-level tokenizer, one token a byte, made in a moment, with the chat features a test wants."""

from functools import cache
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<s>", "</s>", "<|user|>", "<|assistant|>", "<|end|>", "<call>", "</call>")

CHAT_TEMPLATE = """\
{%- if tools %}TOOLS {{ tools | tojson }}\n{% endif %}
{%- for message in messages %}
{%- if message.role not in ['system', 'user', 'assistant', 'tool'] %}
{{- raise_exception('Unknown role ' ~ message.role) }}
{%- endif %}
{{- message.role }}: {{ message.content }}
{%- for call in message.tool_calls or [] %}
{{- '[' ~ call.function.name ~ '(' ~ call.function.arguments | tojson ~ ')]' }}
{%- endfor %}
{{- '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}<|assistant|>{% endif %}"""

RESPONSE_TEMPLATE: dict[str, Any] = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|assistant|>",
    "fields": {
        "reasoning_content": {"open": "<think>", "close": "</think>", "content": "text"},
        "tool_calls": {
            "open": "<call>",
            "close": "</call>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close": "<|end|>", "content": "text"},
    },
}


@cache
def byte_tokenizer(*, chat: bool = True, responses: bool = False) -> PreTrainedTokenizerFast:
    """Ids 0..255 are bytes in the alphabet's order, then the special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=list(SPECIAL[2:]),
        clean_up_tokenization_spaces=False,
    )
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    if responses:
        tokenizer.response_template = RESPONSE_TEMPLATE
    return tokenizer
