"""Proximal policy optimisation: its mathematics, the value head and the trainer."""
