"""Trains on two workers with Ray Train; `train_ray.py [RUN]`."""

import contextlib
import json
import sys
from pathlib import Path

import ray
import ray.train.torch
import torch
from ray.train import RunConfig, ScalingConfig
from torch import nn
from torch.utils.data import DataLoader

RUN = str(Path(sys.argv[1]).absolute()) if sys.argv[1:] else None


def train_loop(config):
    import ulysses_monitor as um

    torch.manual_seed(0)
    layers = nn.Embedding(32, 16), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 32)
    model = ray.train.torch.prepare_model(nn.Sequential(*layers))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loader = ray.train.torch.prepare_data_loader(
        DataLoader(torch.randint(0, 32, (48, 9)), batch_size=4)
    )
    log = []
    with contextlib.ExitStack() as stack:
        monitor = None
        if config["run"]:
            monitor = stack.enter_context(um.Monitor(config["run"]).watch(model, optimizer))
        for ids in loader:
            logits = model(ids[:, :-1]).flatten(0, 1)
            loss = nn.functional.cross_entropy(logits, ids[:, 1:].flatten())
            if monitor:
                monitor.observe(loss=loss, tokens=ids.numel())
            optimizer.zero_grad()
            loss.backward()
            if monitor:
                monitor.before_clip()
            norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            log.append({"loss": loss.item(), "grad_norm": norm.item()})
            ray.train.report(log[-1])
    if ray.train.get_context().get_world_rank() == 0:
        folder = Path(config["folder"])
        (folder / "log.json").write_text(json.dumps(log))
        torch.save(model.module.state_dict(), folder / "weights.pt")


if __name__ == "__main__":
    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False, logging_level="error")
    trainer = ray.train.torch.TorchTrainer(
        train_loop,
        train_loop_config={"run": RUN, "folder": str(Path.cwd())},
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(name="ray", storage_path=str(Path.cwd() / "ray")),
    )
    trainer.fit()
