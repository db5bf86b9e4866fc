"""Probes compute metrics from an engine's shards."""

from ulysses_monitor.probes.adapters import AdapterProbe
from ulysses_monitor.probes.assembly import assemble
from ulysses_monitor.probes.base import FollowUp, Probe, Reading
from ulysses_monitor.probes.capture import Capture, CapturedStep
from ulysses_monitor.probes.consistency import ReplicaProbe
from ulysses_monitor.probes.following import FollowingCapture
from ulysses_monitor.probes.layout import Layout
from ulysses_monitor.probes.standard import AdamStateProbe, GradientProbe, ParameterProbe
from ulysses_monitor.probes.updates import UpdateProbe

__all__ = [
    "AdamStateProbe",
    "AdapterProbe",
    "Capture",
    "CapturedStep",
    "FollowUp",
    "FollowingCapture",
    "GradientProbe",
    "Layout",
    "ParameterProbe",
    "Probe",
    "Reading",
    "ReplicaProbe",
    "UpdateProbe",
    "assemble",
]
