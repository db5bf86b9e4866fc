"""Which findings follow from which: by the rules' subjects, and by when they began."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ulysses_monitor.diagnosis.findings import Finding

__all__ = ["LEADS_TO", "Chain", "find_chains"]

_BLOWS_UP = (
    *("early_update", "early_gradient", "gradient_spike", "exploding_layer", "layer_shift"),
    *("exploding_gradient", "loss_spike", "loss_rises", "divergence", "nonfinite"),
)
_STANDS_STILL = ("nothing_moves", "not_learning", "plateau", "lora_idle", "update_ratio_small")
_TOO_FAR = (
    *("update_ratio_large", "weights_jump", "lora_outgrows_base", "lora_rank_collapse"),
    *("vanishing_gradient", "entropy_collapse", "entropy_explosion", "kl_runaway"),
    *("chosen_falls", "preference_margin_runaway", *_BLOWS_UP),
)

LEADS_TO: Mapping[str, Sequence[str]] = {
    # The data and what is made of it.
    "labels_misaligned": ("loss_above_chance", "loss_collapse", "token_accuracy_perfect"),
    "labels_changed": ("data_changed", "loss_spike", "loss_rises", "divergence"),
    "padding_trained": ("dominant_token", "loss_collapse", "token_accuracy_perfect"),
    "special_tokens": ("dominant_token", "loss_collapse"),
    "dominant_token": ("loss_collapse", "token_accuracy_perfect"),
    "data_changed": ("gradient_spike", "loss_spike", "loss_rises", "divergence"),
    "duplicate_rows": ("loss_without_noise", "loss_collapse", "overfitting"),
    "ends_not_trained": ("truncated_answers",),
    "no_labels": ("loss_zero", "nothing_moves", "vanishing_gradient"),
    "same_data_on_ranks": ("loss_collapse", "overfitting"),
    "loss_without_noise": ("loss_collapse", "token_accuracy_perfect", "overfitting"),
    "loss_zero": ("vanishing_gradient", "nothing_moves", "plateau"),
    # The learning rate.
    "rate_out_of_range": (*_TOO_FAR, *_STANDS_STILL),
    "rate_off_schedule": ("rate_zero", *_TOO_FAR, *_STANDS_STILL),
    "rate_jump": _TOO_FAR,
    "rate_reset": _TOO_FAR,
    # LoRA's B begins at zero, and A gets no gradient before B has moved.
    "rate_zero": (*_STANDS_STILL, "state_not_updated", "no_gradient", "lora_imbalance"),
    # The optimizer's settings, and its state.
    "betas_swapped": _TOO_FAR,
    "epsilon_large": ("update_ratio_small", "not_learning", "plateau"),
    "decay_strong": ("weights_shrink", "update_ratio_large", "loss_rises", "divergence"),
    "state_lost": ("loss_after_resume", *_TOO_FAR),
    "loss_after_resume": ("gradient_spike", "loss_spike"),
    # Ranks.
    "straggler": ("throughput_drop", "stall"),
    "replica_drift": _BLOWS_UP,
    # What is trained, and how far it moves.
    "tie_lost": ("does_not_move", "loss_rises", "divergence"),
    "adapter_without_gradient": (
        *("no_gradient", "does_not_move", "lora_imbalance"),
        *_STANDS_STILL,
    ),
    "no_gradient": (
        *("does_not_move", "vanishing_layer", "layer_shift", "lora_imbalance"),
        *_STANDS_STILL,
    ),
    "does_not_move": _STANDS_STILL,
    "lora_idle": ("not_learning", "plateau", "nothing_moves"),
    "nothing_moves": (
        *("does_not_move", "lora_idle", "no_gradient", "lora_imbalance"),
        *("state_not_updated", "not_learning", "plateau"),
    ),
    "state_not_updated": ("nothing_moves", "not_learning", "plateau"),
    "second_moment_small": ("update_ratio_small", "update_ratio_large", "not_learning", "plateau"),
    "always_clipping": ("update_ratio_small", "not_learning", "plateau"),
    "update_ratio_small": ("not_learning", "plateau"),
    "gradients_not_cleared": (
        *("gradients_accumulate", "always_clipping", "update_ratio_large"),
        *_BLOWS_UP,
    ),
    "gradients_accumulate": ("always_clipping", "update_ratio_large", *_BLOWS_UP),
    "update_ratio_large": _TOO_FAR,
    "weights_jump": _BLOWS_UP,
    "weights_shrink": ("vanishing_gradient", "divergence", "loss_spike", "layer_shift"),
    "vanishing_layer": ("layer_shift", "not_learning", "plateau"),
    "lora_imbalance": ("not_learning", "plateau"),
    "lora_outgrows_base": ("lora_rank_collapse", *_BLOWS_UP),
    # Reinforcement learning and preferences.
    "sampler_mismatch": ("importance_ratio_off",),
    "importance_ratio_off": ("clip_fraction_high", "kl_runaway"),
    "clip_fraction_high": ("kl_runaway", "plateau"),
    "reward_outlier": ("value_loss_explosion", "gradient_spike", "loss_spike"),
    "value_loss_explosion": ("reward_collapse", "gradient_spike", "divergence"),
    "entropy_collapse": ("zero_advantage", "reward_spread_zero", "length_collapse", "plateau"),
    "kl_runaway": ("entropy_explosion", "reward_collapse", "divergence"),
    "format_hacking": ("reward_spread_zero", "zero_advantage"),
    "length_hacking": ("truncated_answers", "rewards_divided"),
    "truncated_answers": ("reward_collapse", "zero_advantage", "reward_spread_zero"),
    "reward_constant": ("reward_spread_zero", "zero_advantage", "plateau"),
    "reward_spread_zero": ("zero_advantage", "loss_zero", "plateau"),
    "zero_advantage": ("loss_zero", "vanishing_gradient", "plateau"),
    "preference_sides_equal": (
        *("preferences_inverted", "second_moment_small", "no_gradient"),
        *("vanishing_gradient", "not_learning", "plateau"),
    ),
    "preferences_inverted": ("chosen_falls",),
    # How a training breaks down.
    "early_update": _BLOWS_UP,
    "early_gradient": _BLOWS_UP,
    "early_activation": _BLOWS_UP,
    "early_kurtosis": _BLOWS_UP,
    "early_attention": _BLOWS_UP,
    "exploding_layer": _BLOWS_UP,
    "layer_shift": _BLOWS_UP,
    "gradient_spike": ("exploding_gradient", "loss_spike", "divergence", "nonfinite"),
    "exploding_gradient": ("loss_spike", "divergence", "nonfinite"),
    "loss_spike": ("gradient_spike", "divergence", "nonfinite"),
    "loss_rises": ("divergence", "nonfinite"),
    "divergence": ("nonfinite", "plateau"),
    # A norm leaves NaN out: that of a tensor full of it is zero.
    "nonfinite": (
        "skipped_steps",
        "divergence",
        *_STANDS_STILL,
        "state_not_updated",
        "no_gradient",
    ),
    "skipped_steps": ("state_not_updated", "not_learning", "plateau"),
    "loss_collapse": (
        *("token_accuracy_perfect", "vanishing_gradient"),
        *("evaluation_stuck", "overfitting"),
    ),
    "evaluation_stuck": ("overfitting",),
    # The machine.
    "memory_creep": ("throughput_drop", "stall"),
}
"""What may follow from what a rule finds. Those that come first here name causes, later ones
symptoms; of two that may follow from one another, the one that began first is the cause."""

_PLACE = {name: i for i, name in enumerate(LEADS_TO)}
_FIRST_SYMPTOM = _PLACE["early_update"]


@dataclass(frozen=True)
class Chain:
    """A finding that follows from no other, and all that follows from it.

    Attributes:
        root: the probable cause.
        followers: what follows from it, by the step that it began at.
        because: the rule that each follower follows from most directly, by the follower's rule.
    """

    root: Finding
    followers: Sequence[Finding]
    because: Mapping[str, str]

    @property
    def badness(self) -> int:
        """0 for the worst: of the root and all that follows from it."""
        return min(each.badness for each in (self.root, *self.followers))


def find_chains(findings: Sequence[Finding]) -> list[Chain]:
    """Sorts findings into chains, the most probable root cause first.

    First come those that explain the worst, and of these the ones that name a cause and not a
    symptom, and that began first. A finding belongs to the first chain that explains it.
    """
    chains: list[Chain] = []
    told: set[str] = set()
    # Those that follow from nothing come first; of a circle, the one that began first is left.
    for each in sorted(findings, key=lambda f: (any(_leads(o, f) for o in findings), _order(f))):
        if each.rule not in told or not any(_leads(other, each) for other in findings):
            chains.append(_make_chain(each, findings))
            told |= {each.rule, *(follower.rule for follower in chains[-1].followers)}
    chains.sort(key=_rank)
    taken: set[str] = set()
    for i, chain in enumerate(chains):
        kept = [each for each in chain.followers if each.rule not in taken]
        taken |= {each.rule for each in kept}
        chains[i] = Chain(chain.root, kept, {f.rule: chain.because[f.rule] for f in kept})
    return sorted(chains, key=_rank)


def _rank(chain: Chain) -> tuple[int, bool, int, int]:
    is_symptom = _PLACE.get(chain.root.topic, len(_PLACE)) >= _FIRST_SYMPTOM
    return chain.badness, is_symptom, chain.root.since, -len(chain.followers)


def _make_chain(root: Finding, findings: Sequence[Finding]) -> Chain:
    reached, ahead = {root.rule}, [root]
    while ahead:
        first = ahead.pop()
        new = [f for f in findings if f.rule not in reached and _leads(first, f)]
        reached |= {each.rule for each in new}
        ahead += new
    followers = [each for each in findings if each.rule in reached and each is not root]
    because = {each.rule: _nearest(each, [root, *followers]).rule for each in followers}
    return Chain(root, followers, because)


def _nearest(finding: Finding, others: Sequence[Finding]) -> Finding:
    """Returns what a finding follows from most directly: named by the table, and the latest."""
    before = [other for other in others if _leads(other, finding)]
    return max(before, key=lambda other: (finding.topic in LEADS_TO[other.topic], other.since))


def _leads(first: Finding, second: Finding) -> bool:
    """Whether `second` follows from `first`: it can, and it did not begin before."""
    if first is second or second.topic not in _reach(first.topic):
        return False
    ahead, back = (_directness(*pair) for pair in ((first, second), (second, first)))
    if ahead == back:  # each may follow from the other: the one that began first leads
        return _order(first) < _order(second)
    return ahead > back and first.earliest <= second.since


def _directness(first: Finding, second: Finding) -> int:
    """Returns 2 if `second` may follow from `first`, 1 if over others, 0 if not."""
    if second.topic in LEADS_TO.get(first.topic, ()):
        return 2
    return int(second.topic in _reach(first.topic))


def _order(finding: Finding) -> tuple[int, int, str]:
    return finding.since, _PLACE.get(finding.topic, len(_PLACE)), finding.rule


@functools.cache
def _reach(topic: str) -> frozenset[str]:
    """Returns all that may follow from what a rule finds, over any number of others."""
    found: set[str] = set()
    ahead = [topic]
    while ahead:
        new = set(LEADS_TO.get(ahead.pop(), ())) - found
        found |= new
        ahead += new
    return frozenset(found - {topic})
