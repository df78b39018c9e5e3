"""Boundary: how deep a LoRA adapter has to reach.

A library of its own: it takes a model and a tokenizer, and imports nothing of the server.
"""
