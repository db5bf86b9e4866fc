"""The name ``ulysses`` for transformers' ``report_to`` and accelerate's ``log_with``."""
