"""What modules give and get: activations, output gradients, attention logits, load of experts."""

from ulysses_monitor.probes.modules.probe import ModuleProbe, Surroundings
from ulysses_monitor.probes.modules.settings import ModuleProbes, ProbeMaker

__all__ = ["ModuleProbe", "ModuleProbes", "ProbeMaker", "Surroundings"]
