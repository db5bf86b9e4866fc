"""The notebooks run from top to bottom on a small run, and are stored without output."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
import torch
from nbclient import NotebookClient
from torch import Tensor, nn

import ulysses_monitor as um

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
EXPLORE = next(path for path in NOTEBOOKS if path.name == "explore_run.ipynb")


class Matrix(nn.Module):
    """The A or B matrix of an adapter, named as PEFT names it."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.default = nn.Module()
        self.default.weight = nn.Parameter(value)


class Adapted(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.lora_A = Matrix(torch.randn(2, width))
        self.lora_B = Matrix(torch.zeros(width, 2))

    def forward(self, x: Tensor) -> Tensor:
        return x + x @ self.lora_A.default.weight.T @ self.lora_B.default.weight.T


class Tiny(nn.Module):
    def __init__(self, width: int = 8, layers: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Adapted(width) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 30 steps that a real monitor recorded."""
    path = tmp_path_factory.mktemp("runs") / "tiny"
    torch.manual_seed(0)
    model = Tiny()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with um.Monitor(path, tensorboard=False).watch(model, optimizer) as monitor:
        for _ in range(30):
            x = torch.randn(16, 8)
            loss = (model(x) - 2 * x).pow(2).mean()
            loss.backward()
            monitor.observe(loss=loss, tokens=128)
            optimizer.step()
            optimizer.zero_grad()
    return path


def execute(path: Path, cwd: Path) -> nbformat.NotebookNode:
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=60, resources={"metadata": {"path": str(cwd)}})
    client.execute()
    return notebook


@pytest.mark.timeout(120)
def test_explore_run_shows_summary_alerts_charts_and_tables(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ULYSSES_RUN", str(run_dir))
    notebook = execute(EXPLORE, tmp_path)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    shown = [{kind for out in cell.outputs for kind in out.get("data", {})} for cell in code]
    tables = [i for i, kinds in enumerate(shown) if "text/html" in kinds]
    charts = [i for i, kinds in enumerate(shown) if "image/png" in kinds]
    assert tables == [0, 1, 5, 7]
    assert charts == [2, 3, 4, 6, 8]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_without_output(path: Path) -> None:
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code":
            assert not cell.outputs, cell.source
            assert cell.execution_count is None
