"""What policies ask for, done to a training engine's shards."""

from ulysses_monitor.actions.editor import Effect, GradientEditor
from ulysses_monitor.actions.noise import gaussian, key_of
from ulysses_monitor.actions.rates import RateFactors

__all__ = ["Effect", "GradientEditor", "RateFactors", "gaussian", "key_of"]
