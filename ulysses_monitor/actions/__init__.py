"""What policies ask for, done to a training engine's shards."""

from ulysses_monitor.actions.editor import GradientEditor
from ulysses_monitor.actions.gate import Snapshot, UpdateGate
from ulysses_monitor.actions.noise import gaussian, key_of
from ulysses_monitor.actions.performer import Done, Performed, Performer
from ulysses_monitor.actions.rates import RateFactors

__all__ = [
    "Done",
    "GradientEditor",
    "Performed",
    "Performer",
    "RateFactors",
    "Snapshot",
    "UpdateGate",
    "gaussian",
    "key_of",
]
