"""A small GRPO: answers sampled from a small model, rewards from a function, and its faults.

Legend: B answers, T tokens.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

import ulysses_monitor as um
from benchmarks.faults.model import VOCABULARY, SmallModel
from benchmarks.faults.training import Recorded, Setting
from ulysses_monitor.sinks.memory import MemorySink

__all__ = ["RL_FAULTS", "RLFault", "RLTraining"]

END = 0
"""The token that ends an answer."""
ONSET = 40


@dataclass
class RLTraining:
    """A training; a fault changes its attributes.

    Attributes:
        reward: rewards [B] of answers [B, T] with lengths [B] at a step.
        beta: weight of the KL to the reference.
        passes: passes over one batch of answers.
        sampler_temperature: of the sampler alone, at a step.
        functions: rewards [B] of answers [B, T] by name; if any, they are logged and summed.
    """

    setting: Setting
    rate_factor: float = 1.0
    beta: float = 0.04
    passes: int = 1
    longest: int = 8
    groups: int = 4
    in_group: int = 6
    sampler_temperature: Callable[[int], float] = lambda _: 1.0
    reward: Callable[[int, Tensor, Tensor], Tensor] | None = None
    functions: dict[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    on_step: Callable[[int, RLTraining], None] | None = None
    forbids_end: bool = False

    def run(self) -> Recorded:
        """Trains, and returns what was recorded."""
        torch.manual_seed(self.setting.seed)
        self.model = SmallModel(self.setting.width, self.setting.layers, self.longest + 1)
        self.reference = copy.deepcopy(self.model).requires_grad_(False)
        rate = self.setting.rate * self.rate_factor
        self.optimizer = torch.optim.AdamW(self.model.parameters(), rate)
        sink = MemorySink()
        with tempfile.TemporaryDirectory() as folder:
            monitor = um.Monitor(
                Path(folder) / "run", sinks=[sink], rules="off", tensorboard=False, sample_every=5
            )
            with monitor.watch(self.model, self.optimizer):
                for step in range(1, self.setting.steps + 1):
                    self._step(step, monitor)
        return Recorded(sink.records)

    def _step(self, step: int, monitor: um.Monitor) -> None:
        if self.on_step is not None:
            self.on_step(step, self)
        rows, mask, sampled = self._sample(self.sampler_temperature(step))
        lengths = mask.sum(1)
        scores = {name: function(rows) for name, function in self.functions.items()}
        rewards = (self.reward or healthy_reward)(step, rows, lengths)
        rewards = torch.stack([*scores.values()]).sum(0) if scores else rewards
        grouped = rewards.view(self.groups, self.in_group)
        spread = grouped.std(1, keepdim=True)
        advantages = ((grouped - grouped.mean(1, keepdim=True)) / (spread + 1e-4)).view(-1, 1)
        old = None
        numbers: dict[str, float] = {}
        for _ in range(self.passes):
            new, entropy = self._log_probabilities(self.model, rows)
            old = new.detach() if old is None else old
            with torch.no_grad():
                reference, _ = self._log_probabilities(self.reference, rows)
            ratio = (new - old).exp()
            kept = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
            away = reference - new
            kl = away.exp() - away - 1
            loss = ((-kept + self.beta * kl) * mask).sum() / mask.sum()
            monitor.observe(loss=loss, tokens=rows.numel())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            outside = ((ratio < 0.8) & (advantages < 0)) | ((ratio > 1.2) & (advantages > 0))
            of_tokens = {"kl": kl, "entropy": entropy, "clip_ratio/region_mean": outside.float()}
            means = {name: float((x * mask).sum() / mask.sum()) for name, x in of_tokens.items()}
            difference = ((sampled - old).abs() * mask).sum() / mask.sum()
            numbers = means | {
                "reward": float(rewards.mean()),
                "reward_std": float(grouped.std(1).mean()),
                "frac_reward_zero_std": float((spread < 1e-6).float().mean()),
                "completions/mean_length": float(lengths.float().mean()),
                "completions/clipped_ratio": float((mask[:, -1] * (rows[:, -1] != END)).mean()),
                "sampling/sampling_logp_difference/mean": float(difference),
                **{f"rewards/{name}/mean": float(x.mean()) for name, x in scores.items()},
            }
        monitor.log({f"train/{name}/total": value for name, value in numbers.items()})

    def _sample(self, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
        """Returns answers, which of their tokens count, and the sampler's log-probabilities."""
        count = self.groups * self.in_group
        rows = torch.full((count, 1), 1)
        sampled = []
        with torch.no_grad():
            for _ in range(self.longest):
                logits = self.model(rows)[:, -1] / temperature
                logits[:, END] += 1.0 - 1e4 * self.forbids_end
                found = logits.log_softmax(-1)
                token = torch.multinomial(found.exp(), 1)
                sampled.append(found.gather(1, token))
                rows = torch.cat([rows, token], dim=1)
        rows = rows[:, 1:]
        ended = (rows == END).float().cumsum(1)
        mask = ((ended == 0) | ((rows == END) & (ended == 1))).float()
        return rows, mask, torch.cat(sampled, dim=1)

    def _log_probabilities(self, model: SmallModel, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Returns log-probabilities and entropies of the tokens of answers [B, T]."""
        start = torch.full((len(rows), 1), 1)
        logits = model(torch.cat([start, rows[:, :-1]], dim=1))
        bias = torch.zeros(VOCABULARY)
        bias[END] = 1.0 - 1e4 * self.forbids_end
        found = (logits + bias).log_softmax(-1)
        entropy = -(found.exp() * found).sum(-1)
        return found.gather(-1, rows[..., None]).squeeze(-1), entropy.detach()


def healthy_reward(_: int, rows: Tensor, lengths: Tensor) -> Tensor:
    """Rewards even tokens, a little, and answers of about five tokens."""
    counts = torch.arange(rows.shape[1]) < lengths[:, None]
    even = ((rows % 2 == 0) & counts).sum(1) / lengths
    return even - 0.05 * (lengths - 5).abs() + 0.05 * torch.randn(len(rows))


@dataclass(frozen=True)
class RLFault:
    """See `benchmarks.faults.registry.Fault`."""

    name: str
    breaks: Callable[[RLTraining], None]
    onset: int
    names: tuple[str, ...]


RL_FAULTS: dict[str, RLFault] = {}


def _fault(*names: str, onset: int = 1) -> Callable[[Callable[[RLTraining], None]], object]:
    def declare(breaks: Callable[[RLTraining], None]) -> object:
        RL_FAULTS[breaks.__name__] = RLFault(breaks.__name__, breaks, onset, names)
        return breaks

    return declare


@_fault("entropy_collapse", "kl_runaway")
def one_answer_is_enough(t: RLTraining) -> None:
    t.beta, t.rate_factor = 0.0, 5.0
    t.reward = lambda _, rows, __: (rows[:, 0] == 7).float() + 0.2 * (rows == 7).float().mean(1)


@_fault(
    *("rate_out_of_range", "kl_runaway", "entropy_collapse", "update_ratio_large"),
    *("reward_collapse",),
)
def rate_too_high_without_kl(t: RLTraining) -> None:
    t.beta, t.rate_factor = 0.0, 30.0


@_fault("length_hacking", "truncated_answers")
def reward_prefers_length(t: RLTraining) -> None:
    t.reward = lambda _, rows, lengths: lengths / 8 + 0.02 * torch.randn(len(rows))
    t.rate_factor = 3.0


@_fault("length_collapse")
def reward_punishes_length(t: RLTraining) -> None:
    t.reward = lambda _, rows, lengths: -lengths / 8 + 0.02 * torch.randn(len(rows))
    t.rate_factor = 3.0


@_fault("zero_advantage", "reward_spread_zero", "reward_constant")
def reward_always_one(t: RLTraining) -> None:
    t.reward = lambda _, rows, __: torch.ones(len(rows))


@_fault("zero_advantage", "reward_spread_zero", "reward_constant", onset=ONSET)
def reward_fails_silently(t: RLTraining) -> None:
    t.reward = lambda step, rows, lengths: (
        healthy_reward(step, rows, lengths) if step < ONSET else torch.zeros(len(rows))
    )


@_fault("reward_outlier", onset=ONSET)
def reward_without_bounds(t: RLTraining) -> None:
    def outlier(step: int, rows: Tensor, lengths: Tensor) -> Tensor:
        found = healthy_reward(step, rows, lengths)
        if step == ONSET:
            found[0] = 1e4
        return found

    t.reward = outlier


@_fault("clip_fraction_high", "kl_runaway", "entropy_collapse")
def many_passes_over_one_batch(t: RLTraining) -> None:
    t.passes, t.rate_factor = 6, 5.0


@_fault("truncated_answers")
def answers_never_end(t: RLTraining) -> None:
    t.forbids_end = True


@_fault("sampler_mismatch", onset=ONSET)
def sampler_has_another_temperature(t: RLTraining) -> None:
    t.sampler_temperature = lambda step: 1.0 if step < ONSET else 0.4


@_fault("reward_collapse", "divergence", "entropy_explosion", onset=50)
def reward_turned_round(t: RLTraining) -> None:
    t.rate_factor = 2.0
    t.reward = lambda step, rows, lengths: (
        healthy_reward(step, rows, lengths) * (1.0 if step < 50 else 0.0)
        + (0.0 if step < 50 else 1.0) * ((rows % 2).float().mean(1) - 1.0)
    )


@_fault("weights_jump", "entropy_explosion", "reward_collapse", "kl_runaway", onset=ONSET)
def policy_destroyed(t: RLTraining) -> None:
    def destroy(step: int, training: RLTraining) -> None:
        if step == ONSET:
            with torch.no_grad():
                for parameter in training.model.parameters():
                    parameter += 0.5 * torch.randn_like(parameter)

    t.on_step = destroy


@_fault("format_hacking")
def form_alone_is_rewarded(t: RLTraining) -> None:
    t.rate_factor = 8.0
    t.functions = {
        "format": lambda rows: (rows[:, 0] % 2 == 0).float(),
        "accuracy": lambda rows: torch.zeros(len(rows)),  # the task is too hard
    }
