"""A plugin for vLLM: `model="adapter@12"` is answered by the adapter cut at that depth.

Runs inside vLLM's API server and uses nothing of Fathom's own: no engine, no HTTP, no database.
"""
