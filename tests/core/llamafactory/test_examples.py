"""LLaMA-Factory's examples: accepted and trained, or refused for their reason.

docs/llamafactory.md lists them; `UPDATE_DOCS=1` writes it.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tests.core.cli.conftest import make_world as make_world
from tests.core.llamafactory.examples import _ours, examples, find_checkout
from tests.support.forget import forget_last_trainer
from ulysses_core.cli import main
from ulysses_core.trainers import UlyssesTrainingManager

PAGE = Path(__file__).parents[3] / "docs/llamafactory.md"
EXAMPLES = dict(examples())
START, END = "<!-- examples -->\n", "<!-- end -->"
IN_DEFAULT_RUN = (
    "train_lora/qwen3_lora_sft.yaml",
    "train_lora/qwen3_lora_pretrain.yaml",
    "train_lora/qwen3_lora_reward.yaml",
    "train_lora/qwen3_lora_dpo.yaml",
    "train_lora/qwen3_lora_kto.yaml",
    "extras/dft/qwen2_full_sft.yaml",
    "extras/llama_pro/llama3_freeze_sft.yaml",
    "extras/oft/llama3_oft_sft.yaml",
)
"""The others differ from one of these in keys that have a test of their own."""

NOTES = {
    "train_lora/qwen3_lora_sft_ray.yaml": "without Ray: `--nproc` or torchrun",
    "train_qlora/llama3_lora_sft_aqlm.yaml": "a base quantised to AQLM needs its package and a GPU",
    "train_qlora/llama3_lora_sft_awq.yaml": "a base quantised to AWQ needs gptqmodel and a GPU",
    "train_qlora/llama3_lora_sft_gptq.yaml": "a base quantised to GPTQ needs gptqmodel and a GPU",
    "extras/qoft/llama3_oft_sft_awq.yaml": "a base quantised to AWQ needs gptqmodel and a GPU",
    "extras/qoft/llama3_oft_sft_gptq.yaml": "a base quantised to GPTQ needs gptqmodel and a GPU",
}


@pytest.fixture(scope="module")
def place(make_world: Any) -> Any:
    """Tiny models, an adapter, and the datasets that the examples name."""
    world = make_world()
    tokenizer = AutoTokenizer.from_pretrained(world.path / "tokenizer")
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    more = {"num_hidden_layers": 8, "vocab_size": len(tokenizer)}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**sizes, **more))
    for name in ("model", "model-vl"):
        model.save_pretrained(world.path / name)
        tokenizer.save_pretrained(world.path / name)
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(
        world.path / "adapter"
    )
    config = world.path / "model-vl/config.json"
    parts = json.loads(config.read_text()) | {"vision_config": {"depth": 2}}
    config.write_text(json.dumps(parts))
    _write_datasets(world.path / "data")
    return world


def _write_datasets(folder: Path) -> None:
    words = [f"list map set {i}" for i in range(6)]
    rows = {
        "sft": [{"instruction": w, "input": "", "output": f"sorts every {w}"} for w in words],
        "pt": [{"text": f"holds every {w} in a list"} for w in words],
        "pairs": [{"instruction": w, "chosen": "first", "rejected": "last"} for w in words],
        "tagged": [
            {"instruction": w, "output": "first", "tag": i % 2 == 0} for i, w in enumerate(words)
        ],
    }
    for name, content in rows.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    columns = {
        "pt": {"prompt": "text"},
        "pairs": {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"},
        "tagged": {"prompt": "instruction", "response": "output", "kto_tag": "tag"},
    }
    kinds = {"c4_demo": "pt", "dpo_en_demo": "pairs", "rlhf_v": "pairs", "kto_en_demo": "tagged"}
    names = [
        "identity",
        "alpaca_en_demo",
        "alpaca_zh",
        "alpaca_zh_demo",
        "math",
        "med",
        "mllm_demo",
    ]
    info: dict[str, dict[str, Any]] = {name: {"file_name": "sft.json"} for name in names}
    for name, kind in kinds.items():
        info[name] = {"file_name": f"{kind}.json", "columns": columns[kind]}
        info[name]["ranking"] = kind == "pairs"
    (folder / "dataset_info.json").write_text(json.dumps(info))


def _localise(name: str, values: dict[str, Any]) -> dict[str, Any]:
    """Replaces the paths of models and data, and nothing else."""
    is_vision = "vl" in Path(name).name.lower()
    paths = {
        "model_name_or_path": "model-vl" if is_vision else "model",
        "adapter_name_or_path": "adapter",
        "dataset_dir": "data",
        "export_dir": f"merged/{name}",
    }
    changed = {key: paths.get(key, value) for key, value in values.items()}
    if "export_dir" not in values:
        changed["dataset_dir"] = "data"
    return changed


def _run(
    place: Any, name: str, values: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> tuple[int, str]:
    """Runs `--dry-run`, or `ulysses export`; exit code, and what was printed."""
    path = place.path / "example.yaml"
    path.write_text(yaml.safe_dump(_localise(name, values)))
    is_export = "export_dir" in values
    arguments = ["export", path.name] if is_export else ["train", path.name, "--dry-run"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["ulysses", *arguments])
        with pytest.raises(SystemExit) as caught:
            main()
    out, error = capsys.readouterr()
    assert error.count("\n") <= 1 or "Traceback" not in error
    return int(caught.value.code or 0), error or out


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, place: Any) -> None:
    """A machine without the packages that only GPUs use."""
    find = importlib.util.find_spec
    missing = ("bitsandbytes", "flash_attn")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name in missing else find(name, *a)
    )
    monkeypatch.chdir(place.path)


def test_the_page_lists_every_example_with_its_outcome(
    place: Any, bare: None, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {}
    for name, values in sorted(EXAMPLES.items()):
        code, said = _run(place, name, values, capsys)
        assert code in (0, 2), f"{name}: {said}"
        found[name] = _describe(name, values, code, said)
    table = _make_table(found)
    before, _, rest = PAGE.read_text("utf-8").partition(START)
    written, _, after = rest.partition(END)
    if os.environ.get("UPDATE_DOCS"):
        PAGE.write_text(f"{before}{START}{table}{END}{after}", "utf-8")
    else:
        assert written == table, "UPDATE_DOCS=1 writes docs/llamafactory.md"


def _describe(name: str, values: dict[str, Any], code: int, said: str) -> str:
    if code == 0:
        done = "exports" if "export_dir" in values else "trains"
        return f"{done}; {NOTES[name]}" if name in NOTES else done
    reason = said.strip().removeprefix("ulysses: ").removeprefix("example.yaml: ")
    # The values of the examples are not ours.
    return "refused: " + re.sub(r"^(\w+) is ('[^']*'|[^;,]*)[;,] ", r"`\1`: ", reason)


def _make_table(outcomes: dict[str, str]) -> str:
    """A row for each example; one for a folder whose examples are all refused for one reason."""
    rows = ["| example | outcome |", "|---|---|"]
    for folder, group in itertools.groupby(outcomes, lambda name: name.split("/")[0]):
        names = list(group)
        reasons = {re.sub("`.*?`: ", "", outcomes[name], count=1) for name in names}
        if len(names) > 1 and len(reasons) == 1:
            rows.append(f"| `{folder}/**` ({len(names)} files) | {reasons.pop()} |")
        else:
            rows += [f"| `{name}` | {outcomes[name]} |" for name in names]
    return "\n".join(rows) + "\n"


@pytest.mark.skipif(find_checkout() is None, reason="LLAMAFACTORY_EXAMPLES is not set")
def test_ours_have_the_keys_of_the_examples() -> None:
    ours = {name: set(values) for name, values in _ours()}
    theirs = {name: set(values) for name, values in EXAMPLES.items()}
    assert set(ours) == set(theirs)
    different = {name: ours[name] ^ keys for name, keys in theirs.items() if ours[name] != keys}
    assert not different


TRAINED = [
    pytest.param(name, marks=() if name in IN_DEFAULT_RUN else pytest.mark.full)
    for name, values in sorted(EXAMPLES.items())
    if "stage" in values and not values.get("do_predict")
]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", TRAINED)
def test_an_example_that_is_accepted_trains_a_tiny_model(
    place: Any, name: str, bare: None, capsys: pytest.CaptureFixture[str]
) -> None:
    values = EXAMPLES[name]
    code, said = _run(place, name, values, capsys)
    if code == 2:
        assert "refused" in _describe(name, values, code, said)
        return
    changes = {"output_dir": f"runs/{name}", "max_steps": 2, "logging_steps": 1}
    path = place.path / "trained.yaml"
    path.write_text(yaml.safe_dump({**_localise(name, values), **changes}))
    if "deepspeed" in values:
        done = place.run("train", path.name, "--nproc", "2", timeout=500)
        assert done.returncode == 0, done.stderr
    else:
        with UlyssesTrainingManager(path) as manager:
            status = manager.run_training()
        forget_last_trainer()
        assert status["step"] == 2
    saved = place.path / "runs" / name
    weights = [saved / f"{kind}.safetensors" for kind in ("model", "adapter_model")]
    assert any(file.is_file() for file in weights)
