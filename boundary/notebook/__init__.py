"""A PEFT model in memory, its tokenizer and samples: all that a calibration needs where one trains."""
