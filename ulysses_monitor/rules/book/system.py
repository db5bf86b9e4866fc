"""Speed and memory."""

from ulysses_monitor.rules.builtin import entry
from ulysses_monitor.rules.kinds.system import MemoryCreep, SlowDown, Stall

__all__ = ["ENTRIES"]

_FAMILY = "system"

ENTRIES = (
    entry(
        "throughput_drop",
        SlowDown,
        patience=12,
        clear=12,
        cooldown=64,
        family=_FAMILY,
        sees="A speed that stays at half of what it was.",
        formula="tokens a second < 0.5 x median of up to 128 steps before the last 32, for 12 "
        "steps; "
        "only if steps take 0.2 s or more",
        causes=(
            "another program uses the machine",
            "the data loader has become slow: a full cache, a slow disk",
            "a device that throttles for heat",
            "longer rows, so that attention costs more",
        ),
        advice="Look at the machine's load, and at the step's phases.",
    ),
    entry(
        "stall",
        Stall,
        family=_FAMILY,
        sees="One step that took far longer than usual.",
        formula="step > 20 x median of 64 steps, and > 30 s",
        source="others' default for a stall is 1,800 s",
        causes=(
            "a checkpoint or an evaluation within the step",
            "the data loader waited for storage",
            "a rank that was late for a collective",
        ),
        advice="Compare with the checkpoints in the run's events.",
    ),
    entry(
        "memory_creep",
        MemoryCreep,
        clear=64,
        cooldown=256,
        family=_FAMILY,
        sees="The process's memory growing all the time, by a gigabyte and 30 % within 256 steps.",
        formula="memory > max(1.3 x start, start + 1 GB), rising at 90 % of marks 16 steps apart",
        causes=(
            "losses or outputs kept with their graph: use .item() or .detach()",
            "a data set or a cache that grows in memory",
            "workers of the data loader that copy the data set",
        ),
        advice="Look for lists that grow in the loop and in callbacks.",
    ),
    entry(
        "device_memory_creep",
        MemoryCreep,
        metric="system/device_memory_allocated_bytes/total",
        clear=64,
        cooldown=256,
        family=_FAMILY,
        sees="torch's memory on the device growing all the time.",
        formula="as memory_creep, of `system/device_memory_allocated_bytes/total`",
        causes=(
            "losses or outputs kept with their graph: use .item() or .detach()",
            "a cache of keys and values that is never emptied",
            "tensors in a list of a callback",
        ),
        advice="Compare torch.cuda.memory_summary() of two steps.",
    ),
)
