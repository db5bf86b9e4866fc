"""Rewards: numbers that say how good an answer is, by name or by import path."""

from ulysses_core.rewards.answers import extract_answer, is_same_answer
from ulysses_core.rewards.builtin import ExactAnswer, Format, LanguageConsistency
from ulysses_core.rewards.specs import REWARDS, Reward, Scorer, check_rewards, make_rewards

__all__ = [
    "REWARDS",
    "ExactAnswer",
    "Format",
    "LanguageConsistency",
    "Reward",
    "Scorer",
    "check_rewards",
    "extract_answer",
    "is_same_answer",
    "make_rewards",
]
