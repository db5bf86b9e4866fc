"""Reading configs, and the one-line errors about wrong ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ulysses_core.trainers.stage import load_config
from ulysses_monitor.common.errors import InputError

MINIMAL = """
model_name_or_path: some/model
dataset: a, b
learning_rate: 1e-4
"""


@pytest.fixture
def write(tmp_path: Path):
    def _write(text: str, name: str = "run.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path

    return _write


def test_defaults_are_llama_factorys(write):
    config = load_config(write(MINIMAL))
    assert config.name == "run"
    assert config.finetuning.stage == "sft"
    assert config.finetuning.finetuning_type == "lora"
    assert (config.finetuning.lora_rank, config.finetuning.lora_target) == (8, "all")
    assert config.data.dataset == ["a", "b"]
    assert config.data.cutoff_len == 2048
    assert config.settings.sequence_parallel_size == 1
    assert config.deepspeed is None


def test_numbers_that_yaml_reads_as_text_become_numbers(write):
    assert load_config(write(MINIMAL)).training["learning_rate"] == pytest.approx(1e-4)


def test_overrides_replace_values_of_the_file_and_of_nested_mappings(write):
    path = write(MINIMAL + "monitor:\n  sample_every: 5\n")
    config = load_config(path, ["monitor.tensorboard=false", "lora_rank=4", "save_strategy=no"])
    assert config.settings.monitor.sample_every == 5
    assert not config.settings.monitor.tensorboard
    assert config.finetuning.lora_rank == 4
    assert config.training["save_strategy"] == "no"


def test_monitor_can_be_true_or_false(write):
    assert not load_config(write(MINIMAL), ["monitor=false"]).settings.monitor.enabled


def test_warmup_ratio_becomes_warmup_steps(write):
    assert load_config(write(MINIMAL), ["warmup_ratio=0.1"]).training["warmup_steps"] == 0.1


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3", "zero2-offload", "zero3-offload"])
def test_shipped_deepspeed_settings_have_the_stage_of_their_name(write, name):
    config = load_config(write(MINIMAL), [f"deepspeed={name}"])
    zero = config.deepspeed["zero_optimization"]
    assert zero["stage"] == int(name[4])
    assert ("offload_optimizer" in zero) == name.endswith("offload")


def test_sequence_parallel_size_moves_from_the_deepspeed_json_to_the_settings(write, tmp_path):
    settings = {"zero_optimization": {"stage": 2}, "sequence_parallel_size": 2}
    (tmp_path / "ds.json").write_text(json.dumps(settings))
    config = load_config(write(MINIMAL), [f"deepspeed={tmp_path / 'ds.json'}"])
    assert config.settings.sequence_parallel_size == 2
    assert "sequence_parallel_size" not in config.deepspeed
    both = [f"deepspeed={tmp_path / 'ds.json'}", "sequence_parallel_size=4"]
    assert load_config(write(MINIMAL), both).settings.sequence_parallel_size == 4


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["lora_rnk=3"], r"unknown key 'lora_rnk' \(did you mean 'lora_rank'\?\)"),
        (["learning_rte=3"], r"unknown key 'learning_rte' \(did you mean 'learning_rate'\?\)"),
        (["quantization_bit=4"], "a LLaMA-Factory key that this project does not support"),
        (["stage=ppo"], "neither reward_model nor reward_funcs is set; set one of them"),
        (["pref_beta=1"], "pref_beta is a key of stage dpo and kto; stage is sft, so remove it"),
        (["stage=dpo", "kto_chosen_weight=1"], "is a key of stage kto; stage is dpo"),
        (
            ["stage=dpo", "pref_loss=dpo"],
            r"pref_loss is 'dpo' \(did you mean 'ipo'\?\); allowed: sigmoid",
        ),
        (["stage=dpo", "pref_beta=0"], "pref_beta is 0; expected a number above 0"),
        (
            ["stage=sfft"],
            r"stage is 'sfft' \(did you mean 'sft'\?\); allowed: dpo, grpo, kto, ppo, pt, rm, sft",
        ),
        (["learning_rate=fast"], "learning_rate is 'fast'; expected a number"),
        (["eval_strategy=sometimes"], "eval_strategy is 'sometimes'; allowed: no, steps"),
        (["deepspeed=zero22"], r"deepspeed is 'zero22' \(did you mean 'zero2'\?\); expected"),
        (["deepspeed=[1]"], r"deepspeed is \[1\]; expected text or a mapping"),
        (["deepspeed={sequence_parallel_size: 0}"], "size is 0; expected an integer of 1 or more"),
        (["cutoff_len=0"], "cutoff_len is 0; expected an integer above 0"),
        (["model_config.model_type=llama"], "both are set; set exactly one of them"),
        (["model_name_or_path=null"], "neither is set; set exactly one of them"),
        (
            ["monitor.sampel_every=3"],
            r"'monitor.sampel_every' \(did you mean 'sample_every'\?\); allowed: .*sample_every",
        ),
        (["output_dir=[1]"], r"output_dir is \[1\]; expected a path"),
        (["nonsense"], "expected key=value"),
        (["a=[1, 2"], "override 'a=.*not valid YAML"),
        (["lora_rank.deep=1", "lora_rank=2", "lora_rank.deep=3"], "lora_rank is 2, not a mapping"),
        (["sequence_parallel_size=0"], "sequence_parallel_size is 0; expected an integer above 0"),
    ],
)
def test_wrong_values_are_refused_in_one_line(write, overrides, expected):
    with pytest.raises(InputError, match=expected) as caught:
        load_config(write(MINIMAL), overrides)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: [1, 2", "line 1: not valid YAML|line 2: not valid YAML"),
        ("just text", "not a mapping"),
        ("- a\n- b", "not a mapping"),
        ("", "not a mapping"),
        ("1: 2", "not a mapping"),
        ("seed: 1\nseed: 2", "duplicate key 'seed'"),
        ("a: !!python/object/apply:os.getcwd []", "not valid YAML"),
    ],
)
def test_a_file_that_is_not_a_config_is_refused(write, text, expected):
    with pytest.raises(InputError, match=expected):
        load_config(write(text))


def test_a_missing_file_a_folder_and_a_binary_file_are_refused(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(InputError, match="cannot read it"):
        load_config(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="cannot read it as text"):
        load_config(tmp_path / "binary.yaml")


def test_a_deepspeed_file_that_is_not_json_is_refused(write, tmp_path):
    (tmp_path / "ds.json").write_text("{")
    with pytest.raises(InputError, match=r"ds.json, line 1: not valid JSON"):
        load_config(write(MINIMAL), [f"deepspeed={tmp_path / 'ds.json'}"])
