"""Stages of training, and the manager that runs one."""

from ulysses_core.trainers.manager import UlyssesTrainingManager

__all__ = ["UlyssesTrainingManager"]
