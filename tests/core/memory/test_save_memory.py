"""Every switch against the same training without it, in float64, and the memory it saves."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import ulysses_core as uc
from tests.support.forget import forget_last_trainer
from tests.support.sequence_cases import (
    Case,
    build_model,
    build_trainer,
    fingerprint,
    weights_of,
)
from tests.support.spawn import spawn
from ulysses_core.memory import save_memory
from ulysses_monitor.common.errors import InputError

SWITCHES: dict[str, dict[str, Any]] = {
    "loss": {"loss_chunk": 5},
    "loss of one token": {"loss_chunk": 1},
    "loss of all": {"loss_chunk": 10_000},
    "mlp": {"mlp_chunk": 4},
    "offload": {"offload": True},
    "all": {"loss_chunk": 7, "mlp_chunk": 3, "offload": True},
}
CASES = [
    Case(checkpointing=True),
    Case(checkpointing=True, data="no_label_in_a_slice", accumulate=3, rows=1),
    Case(checkpointing=True, model="qwen3", data="packed"),
]


def lora(model: nn.Module) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(r=2, target_modules="all-linear")).double()


def train(
    case: Case,
    switches: dict[str, Any] | None,
    *,
    adapters: bool = False,
    first: bool = True,
    **more: Any,
) -> dict[str, Any]:
    model = build_model(case)
    trainer = build_trainer(case, model=lora(model) if adapters else model, **more)
    if switches and first:
        save_memory(trainer, **switches)
    uc.sequence_parallel(trainer, case.size)
    if switches and not first:
        save_memory(trainer, **switches)
    trainer.train()
    evaluation = trainer.evaluate()
    losses = [e["loss"] for e in trainer.state.log_history if "loss" in e]
    result = {
        "weights": weights_of(trainer.accelerator.unwrap_model(trainer.model)),
        "losses": losses,
        "eval": {k: v for k, v in evaluation.items() if k in ("eval_loss", "eval_logits")},
    }
    forget_last_trainer()
    return result


def bound_of(name: str) -> float:
    """transformers computes the loss of a float64 model in float32; a chunked loss is float64."""
    return 1e-12 if name in ("mlp", "offload") else 1e-6


def assert_same(got: dict[str, Any], truth: dict[str, Any], bound: float) -> None:
    for name, weight in truth["weights"].items():
        error = float((got["weights"][name] - weight).norm() / weight.norm().clamp(min=1e-9))
        assert error <= bound, f"{name}: relative error {error}"
    assert got["losses"] == pytest.approx(truth["losses"], rel=1e-5)
    assert got["eval"] == pytest.approx(truth["eval"], rel=1e-6)


@pytest.fixture(scope="module")
def unswitched() -> Callable[..., dict[str, Any]]:
    known: dict[Any, dict[str, Any]] = {}

    def get(case: Case, **more: Any) -> dict[str, Any]:
        key = case, tuple(sorted(more.items(), key=str))
        if key not in known:
            known[key] = train(case.alone, None, **more)
        return known[key]

    return get


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.label)
@pytest.mark.parametrize("name", SWITCHES)
def test_a_switch_changes_no_result(unswitched: Any, name: str, case: Case) -> None:
    assert_same(train(case.alone, SWITCHES[name]), unswitched(case), bound_of(name))


@pytest.mark.parametrize("name", ["loss", "mlp", "all"])
def test_a_switch_changes_no_result_with_adapters(unswitched: Any, name: str) -> None:
    case = CASES[0].alone
    got = train(case, SWITCHES[name], adapters=True)
    assert_same(got, unswitched(case, adapters=True), bound_of(name))


def test_an_evaluation_that_needs_logits_gets_them(unswitched: Any) -> None:
    truth = unswitched(CASES[0], compute_metrics=fingerprint)
    assert "eval_logits" in truth["eval"]
    got = train(CASES[0].alone, SWITCHES["all"], compute_metrics=fingerprint)
    assert_same(got, truth, bound_of("all"))


def predicted(switches: dict[str, Any] | None, size: int = 1) -> dict[str, Any]:
    trainer = build_trainer(CASES[0])
    if switches:
        save_memory(trainer, **switches)
    uc.sequence_parallel(trainer, size)
    found = trainer.predict(trainer.eval_dataset)
    forget_last_trainer()
    labels = torch.as_tensor(found.label_ids)
    return {"logits": torch.as_tensor(found.predictions)[labels.ne(-100)], "labels": labels}


def predicted_on_ranks() -> list[dict[str, Any]]:
    return [predicted(switches, size=2) for switches in (None, {"loss_chunk": 5})]


def test_predictions_have_the_logits_of_whole_rows_with_and_without_switches() -> None:
    truth = predicted(None)
    assert truth["logits"].shape[1] == 61
    found = [predicted({"loss_chunk": 5})]
    for results in spawn(predicted_on_ranks, 2, timeout=90):
        found += results
    for each in found:
        assert torch.equal(each["labels"], truth["labels"])
        assert float((each["logits"] - truth["logits"]).norm() / truth["logits"].norm()) < 1e-12


def train_on_ranks(names: list[str]) -> dict[str, Any]:
    results = {}
    for name in names:
        for first in (True, False):
            for i, case in enumerate(CASES):
                key = f"{name} {first} {i}"
                try:
                    results[key] = train(case, SWITCHES[name], first=first)
                except Exception:  # noqa: BLE001 - the test of this case reports it
                    results[key] = {"error": traceback.format_exc()}
                    forget_last_trainer()
    return results


def test_switches_and_sequence_parallelism_work_in_either_order(unswitched: Any) -> None:
    for results in spawn(train_on_ranks, 2, args=[["loss", "all"]], timeout=150):
        for key, result in results.items():
            assert "error" not in result, result["error"]
            assert_same(result, unswitched(CASES[int(key.split()[-1])]), bound_of("loss"))


class Largest(TorchDispatchMode):
    """The largest new tensor, in elements."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if type(tensor) is Tensor:
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // 4)
        return result


def largest_of_a_step(**switches: Any) -> int:
    case = Case(checkpointing=True)
    model = build_model(case, vocab_size=2003, intermediate_size=1001, max_position_embeddings=999)
    trainer = build_trainer(case, model=model.float(), fp16=False)
    handle = save_memory(trainer, **switches)
    ids = torch.arange(600)[None]
    largest = Largest()
    with largest:
        trainer.compute_loss(model.train(), {"input_ids": ids, "labels": ids}).backward()
    handle.restore()
    forget_last_trainer()
    return largest.elements


def test_no_tensor_holds_all_logits_or_a_whole_mlp_activation() -> None:
    tokens, vocabulary, inside, width = 600, 2003, 1001, 32
    assert largest_of_a_step() == tokens * vocabulary
    assert largest_of_a_step(loss_chunk=20) == tokens * inside
    assert largest_of_a_step(loss_chunk=20, mlp_chunk=20) == vocabulary * width


def attributes_after_training(switches: dict[str, Any]) -> dict[str, dict[str, Any]]:
    trainer = build_trainer(Case(checkpointing=True))
    handle = save_memory(trainer, **switches)
    trainer.train()
    handle.restore()
    handle.restore()  # a second time changes nothing
    forget_last_trainer()
    return {
        name: {k: getattr(v, "__module__", None) for k, v in vars(module).items()}
        for name, module in trainer.model.named_modules()
    }


def test_restore_leaves_the_model_as_training_without_switches_does() -> None:
    assert attributes_after_training(SWITCHES["all"]) == attributes_after_training({})


@pytest.mark.parametrize(
    ("switches", "word"),
    [
        ({"loss_chunk": 0}, "loss_chunk is 0; expected an integer of 1 or more"),
        ({"mlp_chunk": -1}, "mlp_chunk is -1; expected an integer of 1 or more"),
        ({"offload": True}, "set gradient_checkpointing to true"),
    ],
)
def test_wrong_values_are_refused(switches: dict[str, Any], word: str) -> None:
    trainer = build_trainer(Case())
    with pytest.raises(InputError, match=word):
        save_memory(trainer, **switches)
    forget_last_trainer()


@pytest.mark.parametrize(
    ("model", "switches", "word"),
    [
        ("gemma2", {"loss_chunk": 4}, "does not support final_logit_softcapping of Gemma2"),
        ("qwen3_moe", {"mlp_chunk": 4}, "finds no dense MLP in Qwen3Moe"),
    ],
)
def test_a_model_that_does_not_support_a_switch_is_refused_and_unchanged(
    model: str, switches: dict[str, Any], word: str
) -> None:
    trainer = build_trainer(Case(model=model, checkpointing=True))
    before = set(vars(trainer.model))
    with pytest.raises(InputError, match=word):
        save_memory(trainer, offload=True, **switches)
    assert set(vars(trainer.model)) == before
    forget_last_trainer()
