"""What fine-tuning methods train, save and start from; each run is one process."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tests.core.cli.conftest import make_world as make_world
from tests.support.forget import forget_last_trainer
from ulysses_core.trainers import UlyssesTrainingManager

LORA = {"stage": "sft", "finetuning_type": "lora", "lora_rank": 4, "dataset": "pairs"}
IDS = torch.arange(3, 19).view(1, -1)


@pytest.fixture(scope="module")
def world(make_world: Any) -> Any:
    """A world with two bases that have weights."""
    world = make_world()
    tokenizer = AutoTokenizer.from_pretrained(world.path / "tokenizer")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    for seed, name in enumerate(("base", "other")):
        torch.manual_seed(seed)
        config = LlamaConfig(**sizes, num_hidden_layers=4, vocab_size=len(tokenizer))
        LlamaForCausalLM(config).save_pretrained(world.path / name)
        tokenizer.save_pretrained(world.path / name)
    return world


@pytest.fixture
def train(world: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(world.path)

    def run(name: str, **changes: Any) -> Any:
        values = {
            "model_config": None,
            "model_name_or_path": "base",
            "tokenizer_name_or_path": None,
            "output_dir": f"runs/{name}",
            "deepspeed": None,
            "sequence_parallel_size": 1,
            "monitor": False,
            "val_size": 0,
            "max_steps": 3,
            "logging_steps": 1,
        }
        path = world.config(f"{name}.yaml", **values | LORA | changes)
        with UlyssesTrainingManager(path) as manager:
            manager.run_training()
        forget_last_trainer()
        return manager.trainer

    return run


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def load(world: Any, adapter: str | None = None, base: str = "base") -> Any:
    model = AutoModelForCausalLM.from_pretrained(world.path / base)
    return model if adapter is None else PeftModel.from_pretrained(model, world.path / adapter)


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


INITS: dict[str, dict[str, Any]] = {
    "orthogonal_small": {"lora_init": "orthogonal_small", "use_rslora": True},
    "orthogonal_small-dora": {"lora_init": "orthogonal_small", "use_dora": True},
    "pissa_niter": {"pissa_init": True, "pissa_iter": 2, "pissa_convert": True},
    "olora": {"lora_init": "olora"},
    "eva": {"lora_init": "eva", "lora_init_rows": 16},
    "corda": {"lora_init": "corda", "lora_init_rows": 16},
    "lora_ga": {"lora_init": "lora_ga"},
    "mica": {"lora_init": "mica"},
    "orthogonal": {"lora_init": "orthogonal"},
}


IN_DEFAULT_RUN = ("orthogonal_small", "eva", "corda")
TRIED_INITS = [
    pytest.param(name, marks=() if name in IN_DEFAULT_RUN else pytest.mark.full) for name in INITS
]


@pytest.mark.parametrize("name", TRIED_INITS)
def test_training_starts_at_the_base_and_its_adapter_loads_onto_the_base(
    world: Any, train: Any, name: str
) -> None:
    base = losses(train(f"plain-{name}", max_steps=1))[0]
    trainer = train(name, **INITS[name])
    assert losses(trainer)[0] == pytest.approx(base, rel=2e-6)
    trained = logits(trainer.model)
    assert (trained - logits(load(world))).abs().max() > 1e-3
    loaded = logits(load(world, f"runs/{name}"))
    torch.testing.assert_close(loaded, trained, rtol=0, atol=1e-5)


def test_the_base_may_stay_uncorrected(world: Any, train: Any) -> None:
    trainer = train("raw", lora_init="orthogonal_small", lora_init_correct_base=False)
    assert not (world.path / "runs/raw/initial_adapter").exists()
    loaded = load(world, "runs/raw")
    assert loaded.peft_config["default"].r == 4
    torch.testing.assert_close(logits(loaded), logits(trainer.model), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "refusal"),  # of PEFT, on the original base
    [
        ("orthogonal_small", "orthogonal_small"),
        pytest.param("corda", "`eigens` attribute not found", marks=pytest.mark.full),
        ("lora_ga", "lora_ga_on_its_own_base"),
    ],
)
def test_a_checkpoint_resumes_and_starts_another_training(
    world: Any, train: Any, name: str, refusal: str
) -> None:
    init = {"lora_init": name, "save_strategy": "steps", "save_steps": 2}
    whole = logits(train(f"whole-{name}", **init).model)
    checkpoint = world.path / f"runs/whole-{name}/checkpoint-2"
    with pytest.raises(ValueError, match=refusal):
        load(world, f"runs/whole-{name}/checkpoint-2")
    resumed = train(f"whole-{name}", resume_from_checkpoint=str(checkpoint), **init)
    torch.testing.assert_close(logits(resumed.model), whole, rtol=0, atol=1e-6)
    again = train(
        f"again-{name}", adapter_name_or_path=str(checkpoint), max_steps=1, learning_rate=0.0
    )
    assert again.model.peft_config["default"].r == 8
    for_base = logits(load(world, f"runs/again-{name}"))
    torch.testing.assert_close(for_base, logits(again.model), rtol=0, atol=1e-5)
    zero = train(f"zero-{name}", max_steps=1, learning_rate=0.0)
    assert losses(again)[0] < losses(zero)[0]


def test_resuming_with_another_start_is_refused(train: Any) -> None:
    init = {"lora_init": "orthogonal_small", "save_strategy": "steps", "save_steps": 2}
    train("start", **init)
    with pytest.raises(Exception, match="the run started from another adapter than this config"):
        train("start", resume_from_checkpoint="runs/start/checkpoint-2", seed=5, **init)
    forget_last_trainer()


def test_adapters_are_merged_before_the_last_one_or_a_new_one_is_trained(
    world: Any, train: Any
) -> None:
    train("one", seed=1)
    train("two", seed=2)
    both = "runs/one, runs/two"
    still = {"adapter_name_or_path": both, "learning_rate": 0.0, "max_steps": 1}
    continued = train("continued", **still)
    new = train("new", **still, create_new_adapter=True, lora_rank=2)
    merged = PeftModel.from_pretrained(load(world, "runs/one").merge_and_unload(), "runs/two")
    for trainer in (continued, new):
        torch.testing.assert_close(logits(trainer.model), logits(merged), rtol=0, atol=1e-5)
    assert continued.model.peft_config["default"].r == 4
    assert new.model.peft_config["default"].r == 2


def test_loraplus_trains_b_at_a_multiple_of_the_learning_rate(train: Any) -> None:
    trainer = train("plus", loraplus_lr_ratio=16.0, lr_scheduler_type="constant", weight_decay=0.1)
    names = {id(p): n for n, p in trainer.model.named_parameters()}
    rates = {}
    for group in trainer.optimizer.param_groups:
        for parameter in group["params"]:
            side = "lora_B" if "lora_B" in names[id(parameter)] else "lora_A"
            rates.setdefault(side, set()).add((group["lr"], group["weight_decay"]))
    assert rates == {"lora_A": {(1e-2, 0.1)}, "lora_B": {(16e-2, 0.1)}}


def changed(world: Any, trainer: Any) -> set[str]:
    """The names of the parameters that a training changed."""
    before = dict(load(world).named_parameters())
    after = trainer.model.named_parameters()
    return {name for name, value in after if not torch.equal(value, before[name])}


FREEZE: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "last": ({"freeze_trainable_layers": 2}, ("layers.2.", "layers.3.")),
    "first": ({"freeze_trainable_layers": -1}, ("layers.0.",)),
    "modules": (
        {"freeze_trainable_layers": 1, "freeze_trainable_modules": "mlp, input_layernorm"},
        ("layers.3.mlp.", "layers.3.input_layernorm."),
    ),
    "extra": (
        {"freeze_trainable_layers": 1, "freeze_extra_modules": "embed_tokens,norm"},
        ("layers.3.", "embed_tokens.", "model.norm."),
    ),
    "llama-pro": (
        {"freeze_trainable_layers": 2, "use_llama_pro": True},
        ("layers.1.", "layers.3."),
    ),
}


@pytest.mark.parametrize("name", FREEZE)
def test_freeze_trains_the_chosen_layers(world: Any, train: Any, name: str) -> None:
    settings, parts = FREEZE[name]
    trainer = train(f"freeze-{name}", finetuning_type="freeze", lora_rank=None, **settings)
    names = [n for n, _ in trainer.model.named_parameters()]
    assert changed(world, trainer) == {n for n in names if any(part in n for part in parts)}
    saved = load(world, base=f"runs/freeze-{name}")
    torch.testing.assert_close(logits(saved), logits(trainer.model), rtol=0, atol=1e-6)


def test_llama_pro_adapts_the_inserted_layers(train: Any) -> None:
    trainer = train("pro", use_llama_pro=True, freeze_trainable_layers=2)
    layers = {
        n.split("layers.")[1][0] for n, p in trainer.model.named_parameters() if p.requires_grad
    }
    assert layers == {"1", "3"}


def test_oft_trains_and_its_adapter_loads(world: Any, train: Any) -> None:
    trainer = train("oft", finetuning_type="oft", oft_block_size=8, oft_target="q_proj,v_proj")
    assert losses(trainer)[0] == pytest.approx(losses(train("plain", max_steps=1))[0], rel=1e-5)
    loaded = load(world, "runs/oft")
    torch.testing.assert_close(logits(loaded), logits(trainer.model), rtol=0, atol=1e-5)


def test_dft_weighs_each_tokens_loss_by_its_probability(world: Any, train: Any) -> None:
    still = {"learning_rate": 0.0, "max_steps": 1, "gradient_accumulation_steps": 2}
    trainer = train("dft", use_dft_loss=True, disable_shuffling=True, **still)
    model, total, count = load(world).eval(), 0.0, 0
    for row in trainer.train_dataset.select(range(8)):
        ids, labels = (torch.tensor([row[key]]) for key in ("input_ids", "labels"))
        with torch.no_grad():
            log_probs = model(ids).logits[:, :-1].log_softmax(-1)
        of_labels = log_probs.gather(2, labels[:, 1:].clamp(0)[..., None])[..., 0]
        of_labels = of_labels[labels[:, 1:] != -100]
        total -= (of_labels * of_labels.exp()).sum().item()
        count += len(of_labels)
    assert losses(trainer)[0] == pytest.approx(total / count, rel=1e-5)


def test_another_reference_model_decides_the_first_loss(world: Any, train: Any) -> None:
    pairs = [
        {"instruction": f"list {i}", "chosen": "sorts every", "rejected": "holds the last"}
        for i in range(8)
    ]
    (world.path / "data/chosen.json").write_text(json.dumps(pairs))
    info = json.loads((world.path / "data/dataset_info.json").read_text())
    columns = {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"}
    info["chosen"] = {"file_name": "chosen.json", "ranking": True, "columns": columns}
    (world.path / "data/dataset_info.json").write_text(json.dumps(info))
    dpo = {"stage": "dpo", "dataset": "chosen", "max_steps": 1}
    own = losses(train("own", **dpo))[0]
    assert own == pytest.approx(0.6931, abs=1e-3)
    other = losses(train("other-lora", ref_model="other", **dpo))[0]
    full = losses(train("other-full", ref_model="other", finetuning_type="full", **dpo))[0]
    assert abs(other - own) > 1e-3
    assert full == pytest.approx(other, rel=1e-4)
    merged = train("merged", ref_model="base", ref_model_adapters="runs/one", **dpo)
    assert abs(losses(merged)[0] - own) > 1e-5
    pissa = train("pissa-dpo", lora_init="pissa", **dpo)  # its reference is the start, not the base
    assert losses(pissa)[0] == pytest.approx(0.6931, abs=1e-3)
    loaded = logits(load(world, "runs/pissa-dpo"))
    torch.testing.assert_close(loaded, logits(pissa.model), rtol=0, atol=1e-5)
    eva = train("eva-dpo", lora_init="eva", **dpo)  # whose layers have ranks of their own
    assert losses(eva)[0] == pytest.approx(0.6931, abs=1e-3)
    torch.testing.assert_close(logits(load(world, "runs/eva-dpo")), logits(eva.model))


def test_without_training_it_evaluates(world: Any, train: Any) -> None:
    trained = train("seen", eval_dataset="pairs", deepspeed="zero2")
    evaluated = train(
        "looked", dataset=None, eval_dataset="pairs", do_train=False, do_eval=True,
        adapter_name_or_path="runs/seen", deepspeed="zero2",
    )  # fmt: skip
    found = json.loads((world.path / "runs/looked/eval_results.json").read_text())
    last = [e["eval_loss"] for e in trained.state.log_history if "eval_loss" in e][-1]
    assert found["eval_loss"] == pytest.approx(last, rel=1e-5)
    assert not (world.path / "runs/looked/adapter_model.safetensors").exists()
    assert evaluated.state.global_step == 0


def test_ppo_scores_with_adapters_of_the_policys_base(world: Any, train: Any) -> None:
    rows = [{"instruction": f"list {i}", "chosen": "sorts", "rejected": "holds"} for i in range(8)]
    (world.path / "data/better.json").write_text(json.dumps(rows))
    info = json.loads((world.path / "data/dataset_info.json").read_text())
    columns = {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"}
    info["better"] = {"file_name": "better.json", "ranking": True, "columns": columns}
    (world.path / "data/dataset_info.json").write_text(json.dumps(info))
    rewarding = train("rewarding", stage="rm", dataset="better", template="default")
    trainer = train(
        "rewarded", stage="ppo", reward_model="runs/rewarding", reward_model_type="lora",
        ref_model="other", template="default", max_new_tokens=4, max_steps=1,
    )  # fmt: skip
    found, expected = trainer.reward_model, rewarding.model.eval()
    with torch.no_grad():
        assert torch.allclose(found(input_ids=IDS).logits, expected(input_ids=IDS).logits)
    assert not any(p.requires_grad for p in found.parameters())
    assert "rewards/reward_model/mean" in trainer.state.log_history[0]


def test_training_stops_early(train: Any) -> None:
    trainer = train(
        "early", dataset="pairs", eval_dataset="pairs", early_stopping_steps=1, max_steps=30,
        eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
        load_best_model_at_end=True, metric_for_best_model="eval_loss", learning_rate=0.0,
    )  # fmt: skip
    assert trainer.state.global_step < 5


def test_train_from_scratch_takes_only_the_config(world: Any, train: Any) -> None:
    trainer = train(
        "scratch", train_from_scratch=True, finetuning_type="full", learning_rate=0.0, max_steps=1
    )
    weight = trainer.model.lm_head.weight
    assert weight.shape == load(world).lm_head.weight.shape
    assert not torch.equal(weight, load(world).lm_head.weight)


def test_pure_bf16_keeps_the_weights_in_bf16(train: Any) -> None:
    trainer = train("bf16", pure_bf16=True, finetuning_type="full", max_steps=1)
    assert {p.dtype for p in trainer.model.parameters()} == {torch.bfloat16}
