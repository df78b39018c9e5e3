"""Every size and rate of the build in one place."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """The numbers of a build. Counts of samples are per adapter."""

    vocab_size: int = 1024
    num_tokenizer_documents: int = 20_000

    num_layers: int = 12
    hidden_size: int = 128
    intermediate_size: int = 384

    num_steps: int = 2_200
    batch_size: int = 4
    block_size: int = 512
    pretrain_lr: float = 3e-3

    rank: int = 8
    num_train: int = 400
    num_valid: int = 200
    num_test: int = 200
    num_epochs: int = 25
    samples_per_step: int = 16
    finetune_lr: float = 2e-3


FULL = Recipe()

QUICK = Recipe(
    num_tokenizer_documents=500,
    num_layers=4,
    num_steps=3,
    hidden_size=32,
    intermediate_size=64,
    num_train=8,
    num_valid=4,
    num_test=4,
    num_epochs=1,
    samples_per_step=4,
)
"""Every stage of a build in seconds; what it makes is noise."""
