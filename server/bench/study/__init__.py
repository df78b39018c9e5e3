"""Adapters of one's own to calibrate: public data sets as splits, and a plain LoRA trainer."""
