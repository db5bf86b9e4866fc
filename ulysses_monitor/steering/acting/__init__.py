"""What policies ask for, done to a training engine's shards."""

from ulysses_monitor.steering.acting.editor import GradientEditor
from ulysses_monitor.steering.acting.gate import UpdateGate
from ulysses_monitor.steering.acting.noise import gaussian, noise_key
from ulysses_monitor.steering.acting.performer import Performer
from ulysses_monitor.steering.acting.rates import RateFactors, scheduled_rates
from ulysses_monitor.steering.acting.snapshot import Snapshot

__all__ = [
    "GradientEditor",
    "Performer",
    "RateFactors",
    "Snapshot",
    "UpdateGate",
    "gaussian",
    "noise_key",
    "scheduled_rates",
]
