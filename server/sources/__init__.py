"""Adapters that lie elsewhere: on the Hugging Face hub, in S3 or another object store."""
