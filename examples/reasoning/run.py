"""Runs the whole road for several seeds and prints the accuracy of each phase.

python -m examples.reasoning.run                  # three seeds, two at a time
python -m examples.reasoning.run --seeds 0 --jobs 1
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from examples.reasoning.data import Sizes, make_data
from examples.reasoning.table import make_table

__all__ = ["PHASES", "Phase", "main", "run_road"]

CONFIGS = Path(__file__).parent
VOTES = 8
"""Answers to a held-out problem, for pass@k and the majority vote."""


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One training, or one sampling of answers.

    Attributes:
        name: its folder.
        config: its YAML.
        model: the phase whose model it starts from or samples; None for a new model.
        data: the phase whose answers it learns from; None for the made data.
        dataset: the dataset, if not the YAML's.
        title: its row in the table; empty for a sampling.
    """

    name: str
    config: str
    model: str | None = None
    data: str | None = None
    dataset: str | None = None
    title: str = ""


PHASES = (
    Phase(name="cold_start", config="cold_start.yaml", title="cold-start SFT"),
    Phase(name="grpo", config="grpo.yaml", model="cold_start", title="GRPO: accuracy, format"),
    Phase(name="sampled", config="sample.yaml", model="grpo"),
    Phase(
        name="sft",
        config="sft.yaml",
        model="cold_start",
        data="sampled",
        title="SFT on kept answers",
    ),
    Phase(name="grpo_mixed", config="grpo_mixed.yaml", model="sft", title="GRPO: mixed rewards"),
    Phase(name="lessons", config="teach.yaml", model="grpo_mixed"),
    Phase(
        name="small",
        config="distil.yaml",
        dataset="worked",
        title="smaller model, worked examples",
    ),
    Phase(name="distilled", config="distil.yaml", data="lessons", title="smaller model, distilled"),
)


@dataclass(frozen=True, kw_only=True)
class Road:
    """The road of one seed.

    Attributes:
        folder: where everything of this seed goes.
        seed: decides the problems, the weights and the answers.
        sizes: how many problems there are.
        overrides: further overrides of each phase's config, by the phase's name.
    """

    folder: Path
    seed: int
    sizes: Sizes = field(default_factory=Sizes)
    overrides: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def changes(self, phase: Phase) -> list[str]:
        """Returns the overrides that put a phase into this road's folders."""
        data = self.folder / (phase.data or "data")
        found = [f"dataset_dir={data}", f"output_dir={self.folder / phase.name}"]
        found += [f"seed={self.seed}", "overwrite_output_dir=true"]
        if phase.dataset is not None:
            found.append(f"dataset={phase.dataset}")
        if phase.model is not None:
            found.append(f"model_name_or_path={self.folder / phase.model}")
        else:
            found.append(f"tokenizer_name_or_path={self.folder / 'data/tokenizer'}")
        return [*found, *self.overrides.get(phase.name, ())]


def run_road(road: Road, report: Callable[[str], None] = print) -> dict[str, Any]:
    """Runs every phase of a road in this process.

    Returns:
        Accuracies by phase, and seconds of wall and CPU time.
    """
    from ulysses_core.cli.logs import quiet_libraries

    quiet_libraries()
    began, used = time.time(), time.process_time()
    make_data(road.folder / "data", road.seed, road.sizes)
    scores = {}
    for phase in PHASES:
        start = time.process_time()
        _run_phase(road, phase)
        if phase.title:
            scores[phase.name] = _measure(road, phase)
        seconds = time.process_time() - start
        report(f"seed {road.seed}: {phase.name} {scores.get(phase.name, '')} ({seconds:.0f} s CPU)")
    result = {
        "seed": road.seed,
        "scores": scores,
        "wall_seconds": time.time() - began,
        "cpu_seconds": time.process_time() - used,
    }
    (road.folder / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    return result


def _run_phase(road: Road, phase: Phase) -> None:
    from ulysses_core import UlyssesTrainingManager
    from ulysses_core.generate import generate, load_generate_config

    path, changes = CONFIGS / phase.config, road.changes(phase)
    if not phase.title:
        generate(load_generate_config(path, changes))
        return
    with UlyssesTrainingManager(path, changes) as manager:
        manager.run_training()


def _measure(road: Road, phase: Phase) -> dict[str, float]:
    """Answers the held-out problems once with the most probable tokens, and several times."""
    common = [
        f"model_name_or_path={road.folder / phase.name}",
        f"dataset_dir={road.folder / 'data'}",
        f"seed={road.seed}",
        "overwrite_output_dir=true",
    ]
    greedy = _answer([*common, f"output_dir={road.folder / 'greedy' / phase.name}"])
    votes = [f"num_answers={VOTES}", "temperature=1"]
    many = _answer([*common, *votes, f"output_dir={road.folder / 'voted' / phase.name}"])
    return {
        "greedy": greedy["pass_at_k"]["1"],
        "pass@1": many["pass_at_k"]["1"],
        f"pass@{VOTES}": many["pass_at_k"][str(VOTES)],
        "majority": many["majority"],
    }


def _answer(changes: list[str]) -> dict[str, Any]:
    from ulysses_core.generate import generate, load_generate_config

    summary = generate(load_generate_config(CONFIGS / "evaluate.yaml", changes))
    assert summary is not None  # noqa: S101 - this is the only process
    return summary


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m examples.reasoning.run", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/reasoning"), help="folder to write")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one road for each")
    parser.add_argument("--jobs", type=int, default=2, help="roads at a time, one thread each")
    arguments = parser.parse_args(argv)
    if len(set(arguments.seeds)) < len(arguments.seeds):
        parser.error(f"--seeds has {arguments.seeds}; expected each seed once")
    if arguments.jobs < 1:
        parser.error(f"--jobs is {arguments.jobs}; expected 1 or more")
    if len(arguments.seeds) == 1:
        [seed] = arguments.seeds
        results = [run_road(Road(folder=arguments.out / f"seed{seed}", seed=seed), _say)]
    else:
        results = list(_run_seeds(arguments.out, arguments.seeds, arguments.jobs))
    table = make_table(results, {phase.name: phase.title for phase in PHASES if phase.title})
    (arguments.out / "table.md").write_text(table + "\n")
    print(table)
    return 0


def _say(line: str) -> None:
    print(line, flush=True)


def _run_seeds(out: Path, seeds: Sequence[int], jobs: int) -> Iterator[dict[str, Any]]:
    """Runs each seed in a process of its own and yields what it wrote."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def run(seed: int) -> dict[str, Any]:
        command = [sys.executable, "-m", "examples.reasoning.run", "--seeds", str(seed)]
        subprocess.run([*command, "--out", str(out)], env=environment, check=True)  # noqa: S603 - our own module
        result: dict[str, Any] = json.loads((out / f"seed{seed}" / "result.json").read_text())
        return result

    with ThreadPoolExecutor(jobs) as pool:
        yield from pool.map(run, seeds)


if __name__ == "__main__":
    sys.exit(main())
