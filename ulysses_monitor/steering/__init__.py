"""Lets policies and people act on a training, on every rank alike."""

from ulysses_monitor.steering.steering import Steering

__all__ = ["Steering"]
