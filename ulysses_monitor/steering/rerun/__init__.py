"""Computes a step again, from kept inputs and random state, and says whether its spike repeats."""

from ulysses_monitor.steering.rerun.rerun import Rerun, make_rerun

__all__ = ["Rerun", "make_rerun"]
