"""`ulysses rows`: which rows a step trained on, and their text if the data is at hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import ulysses_monitor as um
from tests.core.cli.conftest import World
from tests.support.row_cases import FIRST_STEP

Ulysses = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of 12 steps of 2 rows that keeps those of the last 5, and of step 1, with an alert."""
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    data = [torch.full((4,), float(i)) for i in range(24)]
    loader = DataLoader(data, batch_size=2)  # type: ignore[arg-type]
    path = tmp_path / "runs/one"
    monitor = um.Monitor(path, rules=FIRST_STEP, rows=5, tensorboard=False)
    with monitor.watch(model, optimizer, loader=loader):
        for x in loader:
            loss = model(x).square().mean()
            monitor.observe(loss=loss)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return path


def test_a_step_is_a_table_of_its_rows(run: Path, ulysses: Ulysses) -> None:
    code, output, error = ulysses("rows", str(run), "--step", "9")
    assert (code, error) == (0, "")
    assert "step 9: rows, the most suspicious first" in output
    lines = [line for line in output.splitlines() if line.startswith("│")]
    assert [line.split("│")[3].strip() for line in lines] == ["16", "17"]


def test_json_has_every_number_and_the_alerts(run: Path, ulysses: Ulysses) -> None:
    code, output, _ = ulysses("rows", str(run), "--step", "1", "--json")
    found = json.loads(output)
    assert code == 0
    assert (found["step"], found["ranks_missing"]) == (1, [])
    assert [row["index"] for row in found["rows"]] == [0, 1]
    assert set(found["rows"][0]) == {
        *("rank", "micro_batch", "index", "hash", "length", "trained", "loss")
    }
    assert "first" in found["alerts"][0] or "Rows of the step" in found["alerts"][0]


def test_a_step_that_is_not_kept_says_which_are(run: Path, ulysses: Ulysses) -> None:
    code, _, error = ulysses("rows", str(run), "--step", "50")
    assert code == 2
    (line,) = error.splitlines()
    assert "--step is 50" in line
    assert "to 12" in line
    assert "steps with alerts" in line or "1 to 12" in line or "steps 3 to 12" in line


def test_a_run_without_rows_says_so(tmp_path: Path, ulysses: Ulysses) -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with um.Monitor(tmp_path / "run", rows=0, tensorboard=False).watch(model, optimizer):
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
    code, _, error = ulysses("rows", str(tmp_path / "run"), "--step", "1")
    assert code == 2
    assert "keeps no rows; expected a run recorded with monitor.rows of 1 or more" in error


def test_data_shows_the_rows_with_secrets_masked(run: Path, ulysses: Ulysses) -> None:
    data = run.parent / "data.jsonl"
    secret = "sk-" + "a1B2" * 12
    data.write_text("".join(json.dumps({"text": f"number {i} {secret}"}) + "\n" for i in range(24)))
    code, output, _ = ulysses("rows", str(run), "--step", "9", "--data", str(data), "--json")
    assert code == 0
    assert [row["text"][:20] for row in json.loads(output)["rows"]] == [
        '{"text": "number 16 ',
        '{"text": "number 17 ',
    ]
    assert secret not in output
    code, output, _ = ulysses("rows", str(run), "--step", "9", "--data", str(data))
    assert "number 16" in output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--step", "9", "--data", "missing.jsonl"), "--data is missing.jsonl"),
        (("--step", "9", "--data", "."), "--data is ."),
        (("--step", "9", "--config", "missing.yaml"), "missing.yaml"),
        (("--step", "9", "--config", "a", "--data", "b"), "expected one of them"),
        (("--step", "0"), "greater than or equal to 1"),
    ],
)
def test_wrong_input_is_one_line(
    run: Path, ulysses: Ulysses, arguments: tuple[str, ...], said: str
) -> None:
    code, _, error = ulysses("rows", str(run), *arguments)
    assert code == 2
    assert said in error
    assert len(error.splitlines()) == 1


def test_a_config_gives_the_text_that_was_trained_on(world: World) -> None:
    config = world.config(
        stage="sft",
        dataset="pairs",
        sequence_parallel_size=1,
        deepspeed=None,
        template="default",
        max_steps=2,
        cutoff_len=512,
        monitor={"rules": FIRST_STEP},
        output_dir="runs/sft",
    )
    trained = world.run("train", str(config), "--nproc", "1")
    assert trained.returncode == 0, trained.stderr
    shown = world.run("rows", "runs/sft", "--step", "1", "--config", str(config), "--json")
    assert shown.returncode == 0, shown.stderr
    rows = json.loads(shown.stdout)["rows"]
    pairs = (world.path / "data/pairs.jsonl").read_text().splitlines()
    answers = [json.loads(line)["output"] for line in pairs]
    assert len(rows) == 4
    for row in rows:
        assert row["note"] == ""
        assert row["index"] is not None
        # This tokenizer has no decoder: its text is the tokens, with a mark for each space.
        text = row["text"].replace(" ", "").replace("\u0120", " ")
        assert any(answer in text for answer in answers), row["text"]
