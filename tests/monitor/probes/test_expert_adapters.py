"""PEFT's adapters of parameters: those of several experts are left out of ``lora/*``, and told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ulysses_monitor as um
from tests.support.exact_engines import merged


class Experts(nn.Module):
    """Two experts in one tensor, as in transformers' MoE models, and one matrix of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.randn(2, 4, 6) * 0.1)
        self.shared = nn.Parameter(torch.randn(6, 4) * 0.1)

    def forward(self, x: Any) -> Any:
        return torch.einsum("bi,eio->bo", x, self.gate_up) + x @ self.shared.t()


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 4)
        self.experts = Experts()

    def forward(self, x: Any) -> Any:
        return self.experts(self.proj(x)).square().sum()


def train(targets: list[str], folder: Path) -> tuple[Any, dict[str, float], um.MemorySink]:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["proj"], target_parameters=targets)
    model: Any = get_peft_model(Model(), config)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "lora_B" in name:
                param.normal_(std=0.02)
    optimizer, sink = torch.optim.SGD(model.parameters(), lr=0.0), um.MemorySink()
    monitor = um.Monitor(folder, tensorboard=False, sinks=[sink], sample_every=1)
    with monitor.watch(model, optimizer):
        model(torch.ones(1, 4)).backward()
        optimizer.step()
    return model, merged(sink)[0], sink


def test_the_adapters_of_several_experts_are_left_out_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, record, sink = train(["experts.gate_up"], tmp_path / "run")
    modules = {n.split("module/")[1] for n in record if "/module/" in n}
    assert modules == {"base_model.model.proj"}
    assert (
        record["lora/grad_ratio_B_A/total"]
        == record["lora/grad_ratio_B_A/module/base_model.model.proj"]
    )
    assert record["grad/norm/param/base_model.model.experts.lora_A.default.weight"] > 0
    (event,) = [e for e in sink.events if "adapters" in e.data]
    assert event.data["modules"] == ["base_model.model.experts"]
    assert "base_model.model.experts is left out of lora/*" in caplog.text


def test_the_adapter_of_one_matrix_is_measured_against_that_matrix(tmp_path: Path) -> None:
    model, record, sink = train(["experts.shared"], tmp_path / "run")
    wrapper = model.base_model.model.experts
    delta = wrapper.get_delta_weight("default").double()
    name = "module/base_model.model.experts"
    truth = float(delta.norm() / wrapper.get_param().double().norm())
    assert record[f"lora/delta_ratio/{name}"] == pytest.approx(truth, rel=1e-5)
    largest = float(torch.linalg.matrix_norm(delta, 2))
    truth = float(delta.norm()) ** 2 / largest**2
    assert record[f"lora/stable_rank/{name}"] == pytest.approx(truth, rel=1e-5)
    assert not [e for e in sink.events if "adapters" in e.data]
