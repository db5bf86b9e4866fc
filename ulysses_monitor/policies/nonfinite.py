"""Steps whose loss or gradients are not finite: policies are not asked, the update is skipped."""

from __future__ import annotations

import math

from ulysses_monitor.records import Action, StepRecord

__all__ = ["is_finite", "skip_nonfinite"]


def is_finite(record: StepRecord) -> bool:
    """Returns whether the loss and all gradients are finite."""
    loss = record.get("train/loss/total", 0.0)
    return math.isfinite(loss) and not record.get("grad/nonfinite/total", 0.0) > 0


def skip_nonfinite(record: StepRecord) -> Action:
    """Returns the action that skips a step that is not finite and names the tensors."""
    prefix = "grad/nonfinite/param/"
    bad = {n: record[n] for n in record.schema.match(f"{prefix}*") if record[n] > 0}
    loss = record.get("train/loss/total", 0.0)
    where = f"{len(bad)} gradients are NaN or Inf" if bad else f"the loss is {loss}"
    names = tuple(name.removeprefix(prefix) for name in bad) or ("*",)
    read = dict(list(bad.items())[:3])
    if not math.isfinite(loss):
        read["train/loss/total"] = loss
    return Action(kind="skip", targets=names, reason=f"not finite: {where}", read=read)
