"""The stages of training, and the manager that runs them."""

from ulysses_core.trainers.manager import UlyssesTrainingManager

__all__ = ["UlyssesTrainingManager"]
