"""Ranks that differ, or do not differ where they should."""

from ulysses_monitor.rules.builtin import entry
from ulysses_monitor.rules.kinds.ranks import SameLoss, Straggler
from ulysses_monitor.rules.kinds.sanity import ReplicaDrift

__all__ = ["ENTRIES"]

_FAMILY = "ranks"

ENTRIES = (
    entry(
        "replica_drift",
        ReplicaDrift,
        family=_FAMILY,
        sees="Replicas of a parameter, or of a reduced gradient, that differ in any bit, and the "
        "rank that differs. A clip coefficient that differs by rank makes replicas differ.",
        formula="`param/mismatch/total` or `grad/mismatch/total` > 0",
        source="definition",
        causes=(
            "random numbers that differ between ranks: noise, dropout in an edit of the weights",
            "a collective that is missing or averages nothing",
            "a clip coefficient that differs by rank: each clips by the norm of its own part",
            "ranks that loaded different weights",
            "faulty memory",
        ),
        advice="Look for random numbers or edits that differ between ranks, for a model that "
        "ranks load differently, and for faulty memory.",
    ),
    entry(
        "same_data_on_ranks",
        SameLoss,
        patience=2,
        clear=16,
        family=_FAMILY,
        sees="Ranks that have the same loss to the last bit, so they train on the same rows. Ranks "
        "that share a row under sequence parallelism are meant to, and are not looked at.",
        formula="`train/loss_rank_std/total` = 0 for 2 steps, without `sp/...`",
        source="definition",
        causes=(
            "the sampler is not distributed: every rank reads the same rows",
            "each rank seeds the same stream of an iterable dataset",
            "a data set smaller than one global batch",
        ),
        advice="Use a DistributedSampler, or split the stream by rank.",
    ),
    entry(
        "straggler",
        Straggler,
        clear=8,
        cooldown=64,
        family=_FAMILY,
        sees="A rank for which the others wait: it reaches its loss much later, step after step.",
        formula="median over 8 steps of `train/seconds_rank_std/total` > max(0.15 x step, 0.02 s)",
        causes=(
            "a slow data loader or disk on one machine",
            "a device that throttles, or that another program uses",
            "rows of very different length on the ranks",
        ),
        advice="Compare the ranks' step phases with ulysses trace; sort rows by length.",
    ),
)
