"""An adapter cut at a depth, as a plain PEFT checkpoint."""
