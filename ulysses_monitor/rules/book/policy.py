"""Reinforcement learning: the policy, its sampler and its value model."""

from ulysses_monitor.rules.builtin import entry
from ulysses_monitor.rules.kinds.levels import Climb, Drift, Level, Surge

__all__ = ["ENTRIES"]

_FAMILY = "reinforcement learning"
_KL = ("train/kl/total", "train/objective/kl/total")
_ENTROPY = ("train/entropy/total", "train/objective/entropy/total")

ENTRIES = (
    entry(
        "entropy_collapse",
        Drift,
        metrics=_ENTROPY,
        fall=0.15,
        patience=3,
        clear=5,
        family=_FAMILY,
        sees="A policy that has stopped to explore: its entropy is a small part of what it was.",
        formula="entropy < 0.15 x median of the oldest 8 values, at 3 logs",
        causes=(
            "the learning rate is too high",
            "no entropy bonus, and a clip range that is too narrow upwards",
            "a reward that one answer satisfies",
        ),
        advice="Lower the rate; raise the upper clip range (DAPO) or the temperature.",
        source="DAPO (arXiv 2503.14476) describes the collapse; the factor is this project's",
    ),
    entry(
        "entropy_explosion",
        Drift,
        metrics=_ENTROPY,
        rise=3.0,
        patience=3,
        clear=5,
        least=1.0,
        family=_FAMILY,
        sees="A policy that becomes random: its entropy is three times what it was.",
        formula="entropy > 3 x median of the oldest 8 values and > 1, at 3 logs",
        causes=(
            "the policy is being destroyed: the rate is too high",
            "an entropy bonus that is too large",
            "advantages with the wrong sign",
        ),
        advice="Read a few answers; lower the rate.",
    ),
    entry(
        "kl_runaway",
        Surge,
        metrics=_KL,
        least=1.0,
        patience=3,
        clear=5,
        family=_FAMILY,
        sees="A policy that runs away from its reference; reference_drift sees one that drifts.",
        formula="KL > 5 x median of the last 64 logs and > 1, at 3 logs; a line from 0 is at 2 x",
        source="KL begins at 0 and grows, and trainers log it per token or per answer",
        causes=(
            "beta is too small, or 0",
            "the learning rate is too high",
            "the policy has found a reward that the reference would never give",
        ),
        advice="Raise beta; read answers from before and after.",
    ),
    entry(
        "reference_drift",
        Climb,
        metrics=_KL,
        least=1.0,
        patience=3,
        clear=16,
        cooldown=128,
        severity="info",
        family=_FAMILY,
        sees="A policy that drifts away from its reference, slowly and without an end.",
        formula="KL > 1, and the median of each quarter of the last 128 logs > 1.15 x the one "
        "before; a KL that beta holds levels off",
        source="Gao et al. (arXiv 2210.10760): what is meant falls again as KL grows; the factor "
        "is this project's",
        causes=(
            "beta is too small to hold the policy",
            "the reward can still rise where the reference would never go",
            "a policy that truly learns something new, which is meant",
        ),
        advice="Read answers, and judge them with another reward than the trained one; raise beta "
        "or make the policy the new reference.",
    ),
    entry(
        "clip_fraction_high",
        Level,
        metrics=(
            "train/clip_ratio/region_mean/total",
            "train/policy/clipfrac_avg/total",
            "train/clipfrac/total",
        ),
        above=0.4,
        patience=4,
        clear=5,
        family=_FAMILY,
        sees="Most tokens are outside the trust region, so that their gradient is cut to zero.",
        formula="clip fraction > 0.4 at 4 logs",
        source="PPO (arXiv 1707.06347); healthy runs have 0.01 to 0.3",
        causes=(
            "the learning rate is too high, or too many passes over one batch",
            "sampler and trainer compute different log-probabilities",
            "a clip range that is too narrow",
        ),
        advice="Lower the rate or the passes over a batch; compare sampler and trainer.",
    ),
    entry(
        "value_loss_explosion",
        Drift,
        metrics=("train/loss/value_avg/total", "train/value_loss/total", "train/loss/value/total"),
        rise=20.0,
        patience=3,
        clear=5,
        family=_FAMILY,
        sees="A value model whose loss is twenty times what it was.",
        formula="value loss > 20 x median of the oldest 8 values, at 3 logs",
        causes=(
            "the value model's rate is too high",
            "rewards that have changed their scale",
            "returns without bounds: gamma or lambda",
        ),
        advice="Normalise rewards; clip the value loss; lower its rate.",
    ),
    entry(
        "sampler_mismatch",
        Level,
        metrics=("train/sampling/sampling_logp_difference/mean/total",),
        above=0.1,
        patience=3,
        clear=5,
        family=_FAMILY,
        sees="Sampler and trainer that disagree about the probability of the same tokens.",
        formula="mean |log p(sampler) - log p(trainer)| > 0.1 at 3 logs",
        source="TRL logs it; differences of precision alone stay near 0.01",
        causes=(
            "the sampler has old weights",
            "another precision, kernel or attention in the sampler",
            "a temperature or top_p that the trainer does not know",
        ),
        advice="Check when weights are copied to the sampler; use importance sampling correction.",
    ),
    entry(
        "importance_ratio_off",
        Level,
        metrics=(
            "train/sampling/importance_sampling_ratio/mean/total",
            "train/val/ratio/total",
        ),
        above=2.0,
        below=0.5,
        patience=3,
        clear=5,
        family=_FAMILY,
        sees="Importance ratios whose mean is far from 1.",
        formula="mean ratio < 0.5 or > 2 at 3 logs",
        source="definition: the mean of p/q under q is 1",
        causes=(
            "answers that are too old: the policy has moved on",
            "sampler and trainer compute different log-probabilities",
            "log-probabilities of other tokens: an offset of one",
        ),
        advice="Sample more often; compare log-probabilities of one answer by hand.",
    ),
)
