"""Reinforcement learning: rewards and answers."""

from ulysses_monitor.rules.builtin import entry
from ulysses_monitor.rules.kinds.levels import Constant, Drift, Level
from ulysses_monitor.rules.kinds.rewards import (
    Divided,
    Fallen,
    FormatHacking,
    LengthHacking,
)
from ulysses_monitor.rules.kinds.spikes import Outlier

__all__ = ["ENTRIES"]

_FAMILY = "reinforcement learning"
_REWARD = ("train/reward/total", "train/objective/scores/total", "train/mean_reward/total")
_LENGTH = ("train/completions/mean_length/total", "train/response_length/total")

ENTRIES = (
    entry(
        "length_hacking",
        LengthHacking,
        patience=3,
        clear=8,
        family=_FAMILY,
        sees="Answers that become twice as long while the reward rises with their length.",
        formula="mean length > 2 x start, and correlation of length and reward > 0.7 over 32 logs",
        causes=(
            "the reward prefers long answers",
            "the loss is normalised by length, so that long wrong answers cost less (Dr. GRPO)",
            "longer answers are truly better: a reasoning model that learns to think",
        ),
        advice="Read long answers with a high reward; add a length term or use loss_type dr_grpo.",
        source="Dr. GRPO (arXiv 2503.20783) describes the bias",
    ),
    entry(
        "length_collapse",
        Drift,
        metrics=_LENGTH,
        fall=0.25,
        patience=3,
        clear=8,
        family=_FAMILY,
        sees="Answers that have become very short.",
        formula="mean length < 0.25 x median of the oldest 8 values, at 3 logs",
        causes=(
            "the reward punishes length or mistakes more than it rewards answers",
            "the policy ends each answer at once",
            "the reward looks at the first tokens only",
        ),
        advice="Read answers; reward an empty answer less than a wrong one.",
    ),
    entry(
        "truncated_answers",
        Level,
        metrics=("train/completions/clipped_ratio/total",),
        above=0.6,
        patience=5,
        clear=5,
        family=_FAMILY,
        sees="Most answers are cut off at the longest length.",
        formula="`train/completions/clipped_ratio/total` > 0.6 at 5 logs",
        causes=(
            "max_completion_length is too short for this task",
            "the model never ends an answer: EOS is not learnt, or not the template's",
            "answers grow because the reward prefers length",
        ),
        advice="Allow longer answers; mask truncated ones; check EOS.",
    ),
    entry(
        "zero_advantage",
        Level,
        metrics=("train/frac_reward_zero_std/total",),
        above=0.9,
        patience=5,
        clear=5,
        family=_FAMILY,
        sees="Groups in which all answers have the same reward, so that nothing is learnt from "
        "them.",
        formula="`train/frac_reward_zero_std/total` > 0.9 at 5 logs",
        causes=(
            "tasks that are too easy or too hard for the model",
            "the reward function gives one value",
            "answers that are all equal: the temperature is too low, or the entropy has collapsed",
        ),
        advice="Choose tasks that are solved sometimes; raise the temperature or num_generations.",
    ),
    entry(
        "reward_spread_zero",
        Level,
        metrics=("train/reward_std/total",),
        below=1e-6,
        patience=5,
        clear=5,
        family=_FAMILY,
        sees="Rewards that do not differ within a batch.",
        formula="`train/reward_std/total` < 1e-6 at 5 logs",
        causes=(
            "the reward function gives one value",
            "answers that are all equal",
            "an exception in the reward function that is turned into 0",
        ),
        advice="Call the reward function by hand on a right and a wrong answer.",
    ),
    entry(
        "reward_constant",
        Constant,
        metrics=_REWARD,
        steps=10,
        family=_FAMILY,
        clear=3,
        sees="A mean reward that is the same, bit for bit, at ten logs in a row.",
        formula="reward equal at 10 logs",
        source="definition",
        causes=(
            "the reward function is constant or fails silently",
            "the parser never finds an answer",
            "the policy is not updated and answers are sampled greedily",
        ),
        advice="Call the reward function by hand on a right and a wrong answer.",
    ),
    entry(
        "reward_collapse",
        Fallen,
        metrics=_REWARD,
        patience=3,
        clear=8,
        cooldown=32,
        family=_FAMILY,
        sees="A reward that has lost most of what it had gained.",
        formula="mean of 8 logs < best - max(0.7 x gain, 4 standard deviations)",
        causes=(
            "the policy has moved too far: see kl_runaway and entropy_collapse",
            "the learning rate is too high",
            "the tasks have become harder",
        ),
        advice="Go back to the checkpoint with the best reward; lower the rate.",
    ),
    entry(
        "reward_outlier",
        Outlier,
        metric="train/reward/total",
        family=_FAMILY,
        clear=4,
        sees="One batch whose mean reward is far from the others.",
        formula="|reward - mean| > 10 standard deviations of the last 64 logs",
        causes=(
            "the reward function has no bounds",
            "a task whose check is broken",
            "an answer that exploits the reward",
        ),
        advice="Look at the answers of this step; bound the reward.",
    ),
    entry(
        "rewards_divided",
        Divided,
        clear=8,
        patience=3,
        family=_FAMILY,
        sees="One reward function that rises while another falls, such as format against "
        "correctness.",
        formula="mean of 8 logs > first 16 + 4 s for one function and < first 16 - 4 s for another",
        causes=(
            "the policy trades one reward for the other",
            "weights of the reward functions that do not fit",
            "a format reward that is easier than the task: see format_hacking",
        ),
        advice="Weight the functions anew, or make one a condition of the other.",
    ),
    entry(
        "format_hacking",
        FormatHacking,
        clear=8,
        patience=3,
        cooldown=64,
        family=_FAMILY,
        sees="A reward for the form of answers that has risen to its top while no reward for what "
        "they say has risen.",
        formula="for 32 logs, one whose name says format, xml, tag, json or style is at 0.85 x its "
        "highest and > first 8 + 2 s, and all others < first 8 + 0.5 s",
        causes=(
            "the form is easy to learn and pays enough for itself",
            "the task is too hard: a right answer is never sampled, so it is never rewarded",
            "the check of the answer does not understand the form that is rewarded",
        ),
        advice="Pay for the form only where the answer is right; choose easier tasks first; call "
        "the reward function by hand on a right answer in that form.",
    ),
    entry(
        "reward_bimodal",
        Level,
        metrics=("train/reward_bimodality/total",),
        above=0.65,
        patience=5,
        clear=8,
        cooldown=64,
        severity="info",
        family=_FAMILY,
        sees="Rewards of a batch that fall into two groups with little between them. Rewards with "
        "fewer than five values, such as right and wrong, are not looked at.",
        formula="bimodality coefficient, (skewness^2 + 1) / kurtosis, > 0.65 at 5 logs; it is 0.56 "
        "for a uniform distribution and 1 for two values",
        source="Pfister et al. 2013 (doi:10.3389/fpsyg.2013.00700), who draw the line at 0.555",
        causes=(
            "two kinds of tasks, of which one is too easy or too hard",
            "one part of the reward outweighs all others: a penalty, a bonus",
            "two kinds of answers, of which one exploits the reward",
        ),
        advice="Read answers of both groups; look at the reward functions one by one.",
    ),
)
