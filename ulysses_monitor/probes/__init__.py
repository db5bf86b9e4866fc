"""Probes: what is measured on an engine's shards."""

from ulysses_monitor.probes.base import Probe
from ulysses_monitor.probes.capture import Capture
from ulysses_monitor.probes.layout import AdapterPair, Layout
from ulysses_monitor.probes.standard import AdamStateProbe, GradientProbe, ParameterProbe

__all__ = [
    "AdamStateProbe",
    "AdapterPair",
    "Capture",
    "GradientProbe",
    "Layout",
    "ParameterProbe",
    "Probe",
]
