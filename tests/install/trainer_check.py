"""Trains a small model with and without the monitor and compares; a script without pytest.

It also asks for the monitor by name: transformers' ``report_to`` and accelerate's ``log_with``.

`python trainer_check.py` in an environment of the versions to check prints one line of a table. It
fails if the monitor changed a weight or a logged loss, or if its norm is not the Trainer's.
"""

from __future__ import annotations

import importlib.metadata
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import ulysses_monitor as um

STEPS = 6
BOUND = 1e-6
"""Largest relative difference between the monitor's and the Trainer's gradient norm."""


def build_trainer(folder: Path, **more: Any) -> Trainer:
    """Returns a Trainer that accumulates, clips and logs each step."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=61,
        max_position_embeddings=32,
    )
    generator = torch.Generator().manual_seed(2)
    rows = [torch.randint(0, 61, (17,), generator=generator) for _ in range(64)]
    data = [{"input_ids": row, "labels": row, "attention_mask": row * 0 + 1} for row in rows]
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=STEPS,
        learning_rate=1e-2,
        max_grad_norm=0.1,
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        **{"report_to": "none", **more},
    )
    return Trainer(LlamaForCausalLM(config), arguments, train_dataset=data)


def norms_of(run: Path) -> list[float]:
    """Returns a run's gradient norms."""
    return list(um.open_run(run).metrics("grad/norm/total")["grad/norm/total"])


def check_names(folder: Path, expected: list[float]) -> bool:
    """Returns whether a Trainer and an Accelerator know the monitor by name."""
    um.register(tensorboard=False)
    build_trainer(folder / "named", report_to="ulysses").train()
    accelerator = Accelerator(cpu=True, log_with="ulysses")
    accelerator.init_trackers("loop", init_kwargs={"ulysses": {"run_dir": folder / "loop"}})
    accelerator.log({"loss": 2.0}, step=1)
    accelerator.end_training()
    logged = um.open_run(folder / "loop").metrics("train/loss/total")
    return norms_of(folder / "named/ulysses") == expected and float(logged.iloc[0, 0]) == 2.0


def main() -> int:
    """Compares the two trainings and prints the line."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        begin = time.perf_counter()
        plain, watched = build_trainer(folder / "plain"), build_trainer(folder / "watched")
        plain.train()
        um.Monitor(folder / "run", tensorboard=False).attach(watched)
        watched.train()
        seconds = time.perf_counter() - begin
        found = norms_of(folder / "run")
        by_name = check_names(folder, found)
    logs = [[e for e in t.state.log_history if "grad_norm" in e] for t in (plain, watched)]
    norms = [float(entry["grad_norm"]) for entry in logs[1]]
    pairs = list(zip(found, norms, strict=True))
    error = max(abs(a / b - 1) for a, b in pairs)
    ours = watched.model.state_dict()
    same_weights = all(torch.equal(v, ours[k]) for k, v in plain.model.state_dict().items())
    same_losses = [e["loss"] for e in logs[0]] == [e["loss"] for e in logs[1]]
    names = ("torch", "transformers", "accelerate")
    versions = [f"{name} {importlib.metadata.version(name)}" for name in names]
    is_right = error <= BOUND and len(pairs) == STEPS
    is_right &= same_weights and same_losses and by_name
    sys.stdout.write(
        f"{' | '.join(versions)} | weights equal: {same_weights} | losses equal: {same_losses} | "
        f"norm error: {error:.1e} | by name: {by_name} | {seconds:.1f} s | "
        f"{'ok' if is_right else 'WRONG'}\n"
    )
    return 0 if is_right else 1


if __name__ == "__main__":
    sys.exit(main())
