"""Attaching to Hugging Face Trainers; the only part that imports transformers."""
