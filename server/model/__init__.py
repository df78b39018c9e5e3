"""Tensors: base weights, attention, adapters, LoRA hooks. Knows no requests."""
