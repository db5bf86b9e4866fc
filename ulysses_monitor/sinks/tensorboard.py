"""TensorBoard event files with what TensorBoard can bear: totals, layers, medians, evaluations.

One tag per parameter would make TensorBoard unusable on a real model, so ``param/*`` and
``module/*`` scopes go only to the run store; the report and the notebooks read them there.
"""

from __future__ import annotations

import math
from pathlib import Path

from ulysses_monitor.records import Event, Schema, StepRecord

__all__ = ["LAYOUT", "TensorBoardSink"]

LAYOUT = {
    "Training": {
        "loss": ["Multiline", ["train/loss/total", "eval/loss/total"]],
        "gradient norm": ["Multiline", ["grad/norm/total"]],
        "learning rate": ["Multiline", ["optim/lr/.*"]],
        "tokens per second": ["Multiline", ["train/tokens_per_second/total"]],
    },
    "Layers": {
        "gradient norm": ["Multiline", ["grad/norm/layer/.*"]],
        "first moment": ["Multiline", ["optim/exp_avg_norm/layer/.*"]],
        "second moment": ["Multiline", ["optim/exp_avg_sq_mean/layer/.*"]],
    },
    "LoRA": {"B/A gradient ratio (median)": ["Multiline", ["lora/grad_ratio_B_A/total"]]},
    "Monitor": {"overhead": ["Multiline", ["monitor/overhead_seconds/total"]]},
}
"""TensorBoard's Custom Scalars tab."""


class TensorBoardSink:
    """Writes scalars for totals and layers, and alerts as text.

    Args:
        directory: where the event files go.
    """

    name = "tensorboard"

    def __init__(self, directory: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(directory))
        self._writer.add_custom_scalars(LAYOUT)
        self._shown: dict[Schema, list[tuple[int, str]]] = {}

    def write(self, item: StepRecord | Event) -> None:
        """See `Sink.write`."""
        if isinstance(item, StepRecord):
            self._write_record(item)
        elif item.kind == "alert":
            text = f"**{item.data['severity']}**: {item.data['message']} {item.data['hint']}"
            self._writer.add_text("alerts", text, item.step, item.time)

    def _write_record(self, record: StepRecord) -> None:
        if record.schema not in self._shown:
            shown = [(i, n) for i, n in enumerate(record.schema.names) if _is_shown(n)]
            self._shown[record.schema] = shown
        for i, name in self._shown[record.schema]:
            value = float(record.values[i])
            if math.isfinite(value):
                self._writer.add_scalar(name, value, record.step, record.time)

    def flush(self) -> None:
        """See `Sink.flush`."""
        self._writer.flush()

    def close(self) -> None:
        """See `Sink.close`."""
        self._writer.close()


def _is_shown(name: str) -> bool:
    return not name.split("/", 2)[2].startswith(("param/", "module/"))
