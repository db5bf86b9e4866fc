"""`ulysses export`: the merged model gives the logits of the model with its adapters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, OFTConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from tests.core.cli.conftest import make_world as make_world
from tests.core.cli.conftest import ulysses as ulysses

Run = Callable[..., tuple[int, str, str]]
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "vocab_size": 320}
IDS = torch.arange(3, 19).view(1, -1)
KINDS: dict[str, Any] = {
    "lora": LoraConfig(r=4, target_modules="all-linear"),
    "dora": LoraConfig(r=4, target_modules="all-linear", use_dora=True),
    "rslora-head": LoraConfig(
        r=4, target_modules=["q_proj"], use_rslora=True, modules_to_save=["lm_head"]
    ),
    "oft": OFTConfig(r=0, oft_block_size=8, target_modules=["q_proj", "v_proj"]),
}


def draw(model: Any, seed: int) -> Any:
    """Gives adapters weights as if they were trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def place(make_world: Any) -> Path:
    path: Path = make_world().path
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, num_hidden_layers=2)
    LlamaForCausalLM(config).save_pretrained(path / "base")
    tokenizer = AutoTokenizer.from_pretrained(path / "tokenizer")
    tokenizer.save_pretrained(path / "base")
    for seed, (name, settings) in enumerate(KINDS.items()):
        base = AutoModelForCausalLM.from_pretrained(path / "base")
        draw(get_peft_model(base, settings), seed).save_pretrained(path / name)
    return path


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.mark.parametrize("name", KINDS)
def test_the_merged_model_gives_the_logits_of_the_adapted_one(
    ulysses: Run, place: Path, name: str, tmp_path: Path
) -> None:
    base = AutoModelForCausalLM.from_pretrained(place / "base")
    adapted = logits(PeftModel.from_pretrained(base, place / name))
    code, out, error = export(ulysses, place, tmp_path, adapter_name_or_path=str(place / name))
    assert (code, out.strip()) == (0, "merged"), error
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), adapted, rtol=0, atol=1e-5)
    unadapted = logits(AutoModelForCausalLM.from_pretrained(place / "base"))
    assert (logits(merged) - unadapted).abs().max() > 1e-3
    assert len(AutoTokenizer.from_pretrained(tmp_path / "merged")) > 256


def export(run: Run, place: Path, folder: Path, **changes: Any) -> tuple[int, str, str]:
    values = {
        "model_name_or_path": str(place / "base"),
        "template": "llama3",
        "trust_remote_code": True,
        "export_dir": "merged",
        "export_size": 1,
        "export_device": "cpu",
        "export_legacy_format": False,
        **changes,
    }
    (folder / "export.yaml").write_text(yaml.safe_dump(values))
    return run("export", "export.yaml")


def test_several_adapters_are_merged_in_turn_and_saved_in_another_dtype(
    ulysses: Run, place: Path, tmp_path: Path
) -> None:
    both = f"{place / 'lora'}, {place / 'dora'}"
    code, _, error = export(ulysses, place, tmp_path, adapter_name_or_path=both)
    assert code == 0, error
    base = AutoModelForCausalLM.from_pretrained(place / "base")
    one = PeftModel.from_pretrained(base, place / "lora").merge_and_unload()
    expected = logits(PeftModel.from_pretrained(one, place / "dora"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-5)
    code, _, error = export(
        ulysses, place, tmp_path, export_dir="half", infer_dtype="bfloat16", export_device="auto"
    )
    assert code == 0, error
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half").dtype == torch.bfloat16


def test_a_reward_model_keeps_its_head(ulysses: Run, place: Path, tmp_path: Path) -> None:
    config = LlamaConfig(**SIZES, num_hidden_layers=1, num_labels=1, pad_token_id=0)
    model = LlamaForSequenceClassification(config)
    model.save_pretrained(tmp_path / "scores")
    AutoTokenizer.from_pretrained(place / "tokenizer").save_pretrained(tmp_path / "scores")
    settings = LoraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS")
    adapted = draw(get_peft_model(model, settings), 1)
    adapted.save_pretrained(tmp_path / "adapter")
    changes = {"model_name_or_path": "scores", "adapter_name_or_path": "adapter", "stage": "rm"}
    code, _, error = export(ulysses, place, tmp_path, **changes)
    assert code == 0, error
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(adapted), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"export_dir": None}, "export_dir is not set; set it to the folder to save in"),
        ({"export_dir": "taken"}, "export_dir is 'taken', which is not empty; choose another"),
        ({"export_dir": "export.yaml"}, "export_dir is 'export.yaml', which is a file; expected"),
        ({"export_dir": "BASE"}, "from which it would be read; choose another folder"),
        ({"export_size": 0}, "export_size is 0; expected an integer above 0"),
        ({"export_device": "gpu"}, "export_device is 'gpu' (did you mean 'cpu'?); allowed"),
        ({"export_legacy_format": True}, "export_legacy_format: true is not served, because"),
        ({"export_quantization_bit": 4}, "export_quantization_bit is 4; quantising to GPTQ needs"),
        ({"export_hub_model_id": "a/b"}, "export_hub_model_id is 'a/b'; nothing leaves this"),
        ({"adapter_name_or_path": "none"}, "adapter_name_or_path is 'none', but there is no"),
        ({"adapter_name_or_path": "taken"}, "adapter_config.json: no such file; expected the"),
        ({"model_name_or_path": "none"}, "model_name_or_path is 'none', but there is no such"),
        ({"export_dr": "x"}, "unknown key 'export_dr' (did you mean 'export_dir'?)"),
    ],
)
def test_wrong_input_is_one_line(
    ulysses: Run, place: Path, tmp_path: Path, changes: dict[str, Any], expected: str
) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/file").touch()
    values = {k: str(place / "base") if v == "BASE" else v for k, v in changes.items()}
    code, _, error = export(ulysses, place, tmp_path, **values)
    assert (code, error.count("\n")) == (2, 1), error
    assert expected in error


def test_an_adapter_of_another_model_is_refused(ulysses: Run, place: Path, tmp_path: Path) -> None:
    other = LlamaForCausalLM(LlamaConfig(**SIZES | {"hidden_size": 16}, num_hidden_layers=2))
    get_peft_model(other, KINDS["lora"]).save_pretrained(tmp_path / "other")
    code, _, error = export(ulysses, place, tmp_path, adapter_name_or_path="other")
    assert (code, error.count("\n")) == (2, 1), error
    assert "adapter other: cannot load it: " in error
    assert "size mismatch for base_model.model.model.layers.0.self_attn.q_proj.lora_A" in error
