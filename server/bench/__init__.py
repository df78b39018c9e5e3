"""`fathom bench`: how fast the engine is, beside what plain transformers and PEFT do with the same work.

Nothing else imports this package. `options` and `__init__` load no torch, so that help stays quick.
"""
