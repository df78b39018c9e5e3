"""Pretraining of the base model on packed documents of the mixture. Called by `build`."""

import math
from collections.abc import Callable, Iterable, Iterator

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from server.demo.mixture import Document
from server.demo.recipe import Recipe


def as_text(document: Document, tokenizer: PreTrainedTokenizerFast) -> str:
    """The document with its special tokens written out: `bos text eos`, or the chat template's
    rendering.
    """
    if isinstance(document, str):
        return f"{tokenizer.bos_token}{document}{tokenizer.eos_token}"
    return str(tokenizer.apply_chat_template(document, tokenize=False))


def packed(
    documents: Iterable[Document],
    tokenizer: PreTrainedTokenizerFast,
    batch_size: int,
    block_size: int,
) -> Iterator[torch.Tensor]:
    """Batches of token ids, int64 `[batch_size, block_size]`, cut from the concatenated documents.

    A document may begin in one row and end in the next: every token is used once.
    """
    needed = batch_size * block_size
    token_ids: list[int] = []
    for document in documents:
        token_ids += tokenizer.encode(as_text(document, tokenizer), add_special_tokens=False)
        if len(token_ids) >= needed:
            yield torch.tensor(token_ids[:needed]).view(batch_size, block_size)
            del token_ids[:needed]


def learning_rate(step: int, num_steps: int, num_warmup_steps: int) -> float:
    """The fraction of the peak rate: linear warm-up, then a cosine down to a tenth."""
    if step < num_warmup_steps:
        return (step + 1) / num_warmup_steps
    progress = (step - num_warmup_steps) / max(1, num_steps - num_warmup_steps)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))


def pretrain(
    documents: Iterable[Document],
    tokenizer: PreTrainedTokenizerFast,
    recipe: Recipe,
    device: str,
    on_step: Callable[[float], None],
) -> LlamaForCausalLM:
    """Trains a fresh Llama and returns it in bfloat16; `on_step` gets the loss of every step."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=recipe.block_size,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    model.to(torch.device(device))  # type: ignore[arg-type]
    matrices = [param for param in model.parameters() if param.dim() > 1]
    vectors = [param for param in model.parameters() if param.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=recipe.pretrain_lr,
        betas=(0.9, 0.95),
        fused=True,
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: learning_rate(step, recipe.num_steps, min(100, recipe.num_steps // 10 + 1)),
    )
    batches = packed(documents, tokenizer, recipe.batch_size, recipe.block_size)
    model.train()
    for _, batch in zip(range(recipe.num_steps), batches, strict=False):
        input_ids = batch.to(device)
        with torch.autocast(device, torch.bfloat16):
            loss = model(input_ids=input_ids, labels=input_ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        on_step(loss.item())
    model.train(False)
    model.to(torch.bfloat16)  # type: ignore[arg-type]
    return model
