"""Fine-tuning of one LoRA adapter on a few hundred samples. Called by `build`."""

import random
from collections.abc import Callable

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from server.demo.completion import as_batch, chat_ids, plain_ids
from server.demo.pretrain import learning_rate
from server.demo.recipe import Recipe
from server.demo.samples import Sample

LINEAR_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def num_finetune_steps(recipe: Recipe) -> int:
    """How often `finetune` will call its `on_step`."""
    return recipe.num_epochs * (recipe.num_train // recipe.samples_per_step)


def finetune(
    base: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    samples: list[Sample],
    recipe: Recipe,
    seed: int,
    on_step: Callable[[float], None],
) -> PeftModel:
    """Trains an adapter of every Linear in every layer; `base` is wrapped in place and its weights
    stay.

    Each time a sample is read it is a plain completion or a chat turn with equal chance, so that
    the adapter answers both kinds of request.
    """
    rng = random.Random(seed)
    torch.manual_seed(seed)
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=2 * recipe.rank,
        target_modules=LINEAR_MODULES,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, config)
    assert isinstance(model, PeftModel)
    optimizer = torch.optim.AdamW(
        [param for param in model.parameters() if param.requires_grad],
        lr=recipe.finetune_lr,
        weight_decay=0.0,
        fused=True,
    )
    num_steps = num_finetune_steps(recipe)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate(step, num_steps, num_steps // 20 + 1)
    )
    model.train()
    for _ in range(recipe.num_epochs):
        order = rng.sample(samples, len(samples))
        for start in range(0, len(order) - recipe.samples_per_step + 1, recipe.samples_per_step):
            chosen = order[start : start + recipe.samples_per_step]
            pairs = [rng.choice([plain_ids, chat_ids])(sample, tokenizer) for sample in chosen]
            batch = as_batch(pairs, tokenizer.pad_token_id)
            loss = model(
                input_ids=batch.input_ids.to(model.device),
                attention_mask=batch.attention_mask.to(model.device),
                labels=batch.labels.to(model.device),
            ).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            on_step(loss.item())
    model.eval()
    return model
