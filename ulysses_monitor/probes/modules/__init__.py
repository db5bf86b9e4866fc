"""What modules give and get: activations, output gradients, attention logits, load of experts."""

from ulysses_monitor.probes.modules.probe import ModuleProbe, Options, Surroundings

__all__ = ["ModuleProbe", "Options", "Surroundings"]
