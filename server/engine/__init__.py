"""The step: scheduling, KV blocks, sampling, text. Knows requests and tokens, knows no HTTP."""
