"""What policies ask for, done to a training engine's shards."""

from ulysses_monitor.steering.acting.editor import GradientEditor
from ulysses_monitor.steering.acting.gate import Snapshot, UpdateGate
from ulysses_monitor.steering.acting.noise import gaussian, key_of
from ulysses_monitor.steering.acting.performer import Performer
from ulysses_monitor.steering.acting.rates import RateFactors

__all__ = [
    "GradientEditor",
    "Performer",
    "RateFactors",
    "Snapshot",
    "UpdateGate",
    "gaussian",
    "key_of",
]
