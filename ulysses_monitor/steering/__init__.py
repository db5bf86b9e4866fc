"""Lets policies and people act on a training."""

from ulysses_monitor.steering.steering import Steered, Steering

__all__ = ["Steered", "Steering"]
