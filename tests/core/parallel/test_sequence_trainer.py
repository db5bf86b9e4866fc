"""What `sequence_parallel` changes in a Trainer, what it refuses, and how to undo it.

The checks run on the ranks of two child processes.
"""

from __future__ import annotations

import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import ulysses_core as uc
from tests.support.forget import forget_last_trainer
from tests.support.sequence_cases import (
    Case,
    build_model,
    build_trainer,
)
from tests.support.spawn import spawn
from tests.support.stage_cases import (
    StageCase,
    build_stage_trainer,
)
from ulysses_core.parallel.exchange import plan_heads
from ulysses_monitor.common.errors import InputError, UlyssesError


def no_metrics(prediction: Any) -> dict[str, float]:
    """Makes the Trainer gather logits."""
    return {}


def logits_of(trainer: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Returns the logits of whole rows [B, S, V], computed as in an evaluation."""
    trainer.model.eval()
    with torch.no_grad():
        _, outputs = trainer.compute_loss(trainer.model, dict(inputs), return_outputs=True)
    return outputs["logits"]


@contextmanager
def counted(counts: Counter[str]) -> Iterator[None]:
    original = dist.all_to_all_single

    def call(*args: Any, **kwargs: Any) -> Any:
        counts["all_to_all_single"] += 1
        return original(*args, **kwargs)

    dist.all_to_all_single = call
    try:
        yield
    finally:
        dist.all_to_all_single = original


# -- checks -----------------------------------------------------------------------------------


def check_changing_a_document_leaves_the_logits_of_others_bitwise_equal() -> None:
    for model in ("llama", "mistral", "qwen3"):
        trainer = build_trainer(Case(model=model), compute_metrics=no_metrics)
        handle = uc.sequence_parallel(trainer, 2)
        ids = torch.arange(1, 12).repeat(2, 1)
        positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6]]).repeat(2, 1)
        inputs = {"input_ids": ids, "labels": ids, "position_ids": positions}
        changed = inputs | {"input_ids": torch.cat([ids[:, :4] + 20, ids[:, 4:]], dim=1)}
        before, after = logits_of(trainer, inputs), logits_of(trainer, changed)
        assert before.shape == (2, 11, 61)
        assert torch.equal(before[:, 4:], after[:, 4:])
        assert not torch.allclose(before[:, :4], after[:, :4])
        handle.restore()
        forget_last_trainer()


def check_an_attention_layer_exchanges_twice_forward_and_twice_backward() -> None:
    trainer = build_trainer(Case())
    uc.sequence_parallel(trainer, 2)
    ids = torch.arange(1, 12).repeat(2, 1)
    forward: Counter[str] = Counter()
    backward: Counter[str] = Counter()
    with counted(forward):
        loss = trainer.compute_loss(trainer.model.train(), {"input_ids": ids, "labels": ids})
    with counted(backward):
        loss.backward()
    layers = 2
    assert forward == backward == {"all_to_all_single": 2 * layers}


def differing(before: dict[str, Any], after: dict[str, Any]) -> set[str]:
    return {k for k in before | after if before.get(k) is not after.get(k)}


def check_restore_undoes_every_change() -> None:
    untouched = build_trainer(Case(), compute_metrics=no_metrics)
    start = dict(vars(untouched))
    evaluated = untouched.evaluate()
    changed_by_evaluating = differing(start, vars(untouched)) | {"gather_function"}
    forget_last_trainer()
    trainer = build_trainer(Case(), compute_metrics=no_metrics)
    before = dict(vars(trainer))
    accelerator = set(vars(trainer.accelerator))
    implementation = trainer.model.config._attn_implementation
    handle = uc.sequence_parallel(trainer, 2)
    assert trainer.model.config._attn_implementation == "ulysses"
    assert trainer.get_tp_size() == 2
    trainer.evaluate()
    handle.restore()
    handle.restore()  # a second time changes nothing
    changed = differing(before, vars(trainer))
    assert changed <= changed_by_evaluating, changed - changed_by_evaluating
    assert trainer.gather_function is before["gather_function"]
    assert set(vars(trainer.accelerator)) == accelerator
    assert trainer.model.config._attn_implementation == implementation
    again = trainer.evaluate()
    assert again["eval_loss"] == evaluated["eval_loss"]


def check_training_after_restore_equals_training_without_sequence_parallelism() -> None:
    trainer = build_trainer(Case())
    uc.sequence_parallel(trainer, 2).restore()
    trainer.train()
    forget_last_trainer()
    unpatched = build_trainer(Case())
    unpatched.train()
    state = unpatched.model.state_dict()
    for name, weight in trainer.model.state_dict().items():
        assert torch.equal(weight, state[name]), name


def check_cached_dataloaders_of_persistent_workers_are_replaced() -> None:
    """They would distribute rows as before `sequence_parallel` or `restore`."""
    workers = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    trainer = build_trainer(Case(), **workers)
    unsharded = trainer.evaluate()["eval_loss"]
    handle = uc.sequence_parallel(trainer, 2)
    sharded = trainer.evaluate()["eval_loss"]
    handle.restore()
    assert trainer.evaluate()["eval_loss"] == unsharded
    forget_last_trainer()
    fresh = build_trainer(Case())
    uc.sequence_parallel(fresh, 2)
    assert fresh.evaluate()["eval_loss"] == sharded


def check_a_size_of_one_changes_nothing() -> None:
    trainer = build_trainer(Case())
    before = set(vars(trainer))
    uc.sequence_parallel(trainer, 1).restore()
    assert set(vars(trainer)) == before
    assert trainer.model.config._attn_implementation != "ulysses"


def check_the_error_about_a_call_below_the_hooks_says_what_to_change() -> None:
    trainer = build_trainer(Case())
    uc.sequence_parallel(trainer, 2)
    with pytest.raises(UlyssesError, match=r"call handle.restore\(\) first"):
        trainer.model.forward(input_ids=torch.arange(6).unsqueeze(0))


def check_the_model_gives_logits_of_whole_rows_but_not_to_train_on() -> None:
    trainer = build_trainer(Case())
    ids = torch.arange(1, 12).repeat(2, 1)
    with torch.no_grad():
        truth = trainer.model.eval()(input_ids=ids).logits
    uc.sequence_parallel(trainer, 2)
    with torch.no_grad():
        assert torch.allclose(trainer.model(input_ids=ids).logits, truth, rtol=1e-12)
    with pytest.raises(InputError, match="asks for the logits of whole rows in training"):
        trainer.model(input_ids=ids)


def check_ranks_with_different_rows_are_refused_on_each_of_them() -> None:
    trainer = build_trainer(Case())
    uc.sequence_parallel(trainer, 2)
    ids = torch.arange(1, 12).repeat(2, 1)
    trainer.model(input_ids=ids, labels=ids)
    trainer.model.eval()
    with pytest.raises(InputError, match="the ranks of a group got different rows"):
        trainer.model(input_ids=ids + dist.get_rank(), labels=ids)


def check_the_model_generates_as_on_one_process() -> None:
    trainer = build_trainer(Case())
    prompt = {"input_ids": torch.arange(1, 8).repeat(2, 1)}
    prompt["attention_mask"] = torch.ones_like(prompt["input_ids"])
    prompt["attention_mask"][0, :3] = 0
    truth = trainer.model.generate(**prompt, max_new_tokens=5, do_sample=False)
    handle = uc.sequence_parallel(trainer, 2)
    found = trainer.model.generate(**prompt, max_new_tokens=5, do_sample=False)
    assert torch.equal(found, truth)
    assert trainer.model.config._attn_implementation == "ulysses"
    handle.restore()
    assert "generate" not in vars(trainer.model)


def assert_refused(build: Callable[[], Any], word: str, size: int = 2, train: bool = False) -> None:
    trainer = build()
    implementation = trainer.model.config._attn_implementation
    before = set(vars(trainer))
    if train:
        uc.sequence_parallel(trainer, size)
        with pytest.raises(InputError, match=word):
            trainer.train()
    else:
        with pytest.raises(InputError, match=word):
            uc.sequence_parallel(trainer, size)
        assert set(vars(trainer)) == before
        assert trainer.model.config._attn_implementation == implementation
    forget_last_trainer()


def check_settings_that_do_not_work_on_slices_are_refused() -> None:
    def flash() -> Any:
        trainer = build_trainer(Case())
        trainer.model.config._attn_implementation_internal = "flash_attention_2"
        return trainer

    def soft_cap() -> Any:
        trainer = build_trainer(Case(model="gemma2"))
        trainer.model.config._attn_implementation_internal = "sdpa"
        return trainer

    def balance() -> Any:
        trainer = build_trainer(Case(model="qwen3_moe"))
        trainer.model.config.output_router_logits = True
        return trainer

    assert_refused(
        lambda: build_trainer(Case()), "is 3, which does not divide 2 processes; .*: 1, 2,", size=3
    )
    assert_refused(lambda: build_trainer(Case()), "expected an integer of 1 or more", size=0)
    assert_refused(
        flash, "attn_implementation is 'flash_attention_2', but flash_attn is not installed"
    )
    assert_refused(soft_cap, "has no soft cap, and the model needs one")
    assert_refused(balance, "output_router_logits")
    assert_refused(
        lambda: build_trainer(Case(), label_smoothing_factor=0.1),
        "label_smoothing_factor is 0.1; expected 0",
    )


def check_a_trainer_that_samples_is_refused_if_its_batches_do_not_suit_groups() -> None:
    def trainer(**settings: Any) -> Any:
        case = StageCase(stage="grpo", adapters=True, rows=2, settings=tuple(settings.items()))
        return build_stage_trainer(case)

    assert_refused(
        lambda: trainer(num_generations=4),
        "num_generations is 4; expected a divisor of 2, the answers that all sequence groups",
    )
    assert_refused(
        lambda: trainer(num_generations_eval=4),
        "per_device_eval_batch_size is 2, in all sequence groups 2; expected a multiple of the 4",
    )

    def vllm() -> Any:
        made = trainer()
        made.args.use_vllm = True
        return made

    assert_refused(vllm, "use_vllm is true; expected false, because vLLM samples rows for each")


def check_a_trainer_that_samples_is_as_before_after_restore() -> None:
    import trl.trainer.grpo_trainer as module

    trainer = build_stage_trainer(StageCase(stage="grpo", adapters=True))
    before = vars(trainer).copy()
    answers, gather = trainer.args.generation_batch_size, module.gather
    handle = uc.sequence_parallel(trainer, 2)
    assert trainer.args.generation_batch_size == answers // 2
    trainer.args.max_steps = 1
    trainer.train()
    handle.restore()
    assert trainer.args.generation_batch_size == answers
    assert module.gather is gather
    for name in ("_generate", "_prepare_inputs", "compute_loss", "accelerator"):
        assert vars(trainer).get(name) is before.get(name)


def check_a_trainer_of_pairs_is_refused_what_it_cannot_do_on_slices() -> None:
    from trl.experimental.cpo import CPOTrainer

    def of_experts(is_balanced: bool) -> Any:
        trainer = build_stage_trainer(StageCase(stage="orpo"))
        trainer.aux_loss_enabled = is_balanced
        trainer.model.config.output_router_logits = not is_balanced
        return trainer

    class ReadsLogits(CPOTrainer):
        def concatenated_forward(self, *args: Any) -> Any:
            return super().concatenated_forward(*args)

    def reads_logits() -> Any:
        trainer = build_stage_trainer(StageCase(stage="cpo"))
        trainer.__class__ = ReadsLogits
        return trainer

    assert_refused(lambda: of_experts(is_balanced=False), "output_router_logits is true, but the")
    assert_refused(
        lambda: of_experts(is_balanced=True),
        "ORPOTrainer: output_router_logits was true when the trainer was made",
    )
    assert_refused(reads_logits, "CPOTrainer: ReadsLogits has its own concatenated_forward")


def check_a_trainer_of_pairs_is_as_before_after_restore() -> None:
    trainer = build_stage_trainer(StageCase(stage="orpo", adapters=True))
    ids = torch.arange(1, 12).repeat(2, 1)
    before, model = vars(trainer).copy(), trainer.model.get_base_model()
    with torch.no_grad():
        logits = model.eval()(input_ids=ids).logits
    handle = uc.sequence_parallel(trainer, 2)
    assert "forward" in vars(model)
    handle.restore()
    assert "forward" not in vars(model)
    for name in ("concatenated_forward", "store_metrics"):
        assert name not in vars(trainer)
        assert name not in before
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, logits)


def check_a_streamed_dataset_is_refused() -> None:
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self) -> Iterator[dict[str, Tensor]]:
            row = torch.arange(1, 9)
            return iter([{"input_ids": row, "labels": row}] * 20)

    assert_refused(lambda: build_trainer(Case(), train_dataset=Stream()), "streamed", train=True)


def check_rows_longer_than_the_models_positions_are_refused() -> None:
    long = {"input_ids": torch.arange(1, 61).repeat(2)[:65] % 60, "labels": torch.ones(65).long()}
    assert_refused(
        lambda: build_trainer(Case(), train_dataset=[long] * 6),
        "a document has 65 tokens, but the model has 64 positions; shorten",
        train=True,
    )


def check_attention_that_is_not_causal_is_refused() -> None:
    trainer = build_trainer(Case())
    uc.sequence_parallel(trainer, 2)
    inputs = {"input_ids": torch.arange(6).repeat(2, 1), "labels": torch.arange(6).repeat(2, 1)}
    with pytest.raises(UlyssesError, match="attention that is not causal is not supported"):
        trainer.compute_loss(trainer.model, inputs | {"is_causal": False})
    with pytest.raises(UlyssesError, match="sdpa has no attention sinks here"):
        trainer.compute_loss(trainer.model, inputs | {"s_aux": torch.ones(4)})


def gradients_of(trainer: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the gradients of two micro-batches, averaged over ranks by the engine."""
    trainer.model.train()
    trainer.args.gradient_accumulation_steps = 1
    for half in (slice(0, 1), slice(1, 3)):
        batch = {k: v[half] for k, v in inputs.items()}
        count = inputs["labels"][:, 1:].ne(-100).sum() * 1.0
        loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=count)
        loss.backward()
    return {
        name: (g.full_tensor() if hasattr(g := p.grad, "full_tensor") else g).detach().clone()
        for name, p in trainer.model.named_parameters()
    }


def check_gradients_under_fsdp2_equal_one_process() -> None:
    from torch.distributed.fsdp import fully_shard

    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(1, 61, (3, 13), generator=generator)
    labels = ids.clone()
    labels[0, 3:], labels[2, :9] = -100, -100
    inputs = {"input_ids": ids, "labels": labels}
    alone = build_trainer(Case())
    # Every rank has the same rows, so the average over ranks is one process's sum.
    truth = {n: g / dist.get_world_size() for n, g in gradients_of(alone, inputs).items()}
    forget_last_trainer()
    trainer = build_trainer(Case())
    uc.sequence_parallel(trainer, 2)
    for layer in trainer.model.model.layers:
        fully_shard(layer)
    fully_shard(trainer.model)
    for name, gradient in gradients_of(trainer, inputs).items():
        scale = float((gradient * truth[name]).sum() / truth[name].square().sum())
        assert abs(scale - 1) < 1e-6, f"{name}: scale {scale}"
        assert float((gradient - truth[name]).norm() / truth[name].norm()) < 1e-6, name


def check_the_exchange_is_measured_in_training_but_not_in_evaluations() -> None:

    import ulysses_monitor as um
    from ulysses_core.parallel.trainer import SP_METRICS

    trainer = build_trainer(Case(rows=2, data="packed"), eval_strategy="steps", eval_steps=1)
    sink = um.MemorySink()
    folder = tempfile.mkdtemp(prefix="sequence-run-")
    um.Monitor(folder, tensorboard=False, sinks=[sink], if_exists="overwrite").attach(trainer)
    handle = uc.sequence_parallel(trainer, 2)
    trainer.train()
    if dist.get_rank() == 0:
        sizes = [max(len(row["input_ids"]) for row in trainer.train_dataset[i : i + 2])
                 for i in (0, 2)]  # fmt: skip
        records = [r for r in sink.records if "train/loss/total" in r]
        for record, size in zip(records, sizes, strict=True):
            # 2 rows, 4 + 2 * 2 + 4 heads of 8 float64 in 2 layers, forward and backward; half stays
            tokens = 2 * (size + size % 2)
            assert record["sp/all_to_all_bytes/total"] == tokens * 12 * 8 * 8 * 2 * 2 / 2
            vectors = sum(plan_heads(4, 2, 2).count_sent(rank, tokens // 2) for rank in (0, 1))
            assert record["sp/all_to_all_bytes/total"] == vectors * 8 * 8 * 2 * 2
            assert 0 < record["sp/all_to_all_seconds/total"] < 60
    assert trainer.callback_handler.callbacks
    handle.restore()
    assert SP_METRICS[0].startswith("sp/")


def check_the_model_can_train_after_an_input_error() -> None:
    trainer = build_trainer(Case(), label_smoothing_factor=0.1)
    with pytest.raises(InputError):
        uc.sequence_parallel(trainer, 2)
    trainer.train()
    assert trainer.state.global_step == 2


CHECKS = {name: f for name, f in sorted(globals().items()) if name.startswith("check_")}


def run_checks() -> dict[str, str]:
    """The child: every check; what went wrong, or nothing."""
    words = {}
    for name, check in CHECKS.items():
        try:
            check()
            words[name] = ""
        except Exception:  # noqa: BLE001 - the test of this check reports it
            words[name] = traceback.format_exc()
        forget_last_trainer()
    return words


@pytest.fixture(scope="module")
def words() -> list[dict[str, str]]:
    return spawn(run_checks, 2, timeout=150)


@pytest.mark.parametrize("name", CHECKS)
def test_on_two_ranks(words: list[dict[str, str]], name: str) -> None:
    for each in words:
        assert each[name] == ""


def test_the_model_of_the_checks_has_two_layers() -> None:
    assert build_model(Case()).config.num_hidden_layers == 2
