"""Reported bugs that only several processes show."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.faults.ranks import RankTraining
from benchmarks.faults.reported import reported
from benchmarks.faults.training import Setting

LATER = 20

_DRIFT = ("replica_drift",)


def _training(setting: Setting) -> RankTraining:
    return RankTraining(setting, sample_every=1)


@reported(
    "pytorch/pytorch/issues/104336",
    what="moving a model that DDP has makes its hooks miss the gradients, which are not reduced",
    names=_DRIFT,
    ranks=2,
)
def moved_after_ddp(setting: Setting) -> RankTraining:
    training = _training(setting)

    def move(t: RankTraining) -> None:
        t.ddp.double()  # as cuda() does from the CPU: other tensors behind the parameters
        t.ddp.float()

    training.on_wrapped = move
    return training


@reported(
    "pytorch/pytorch/issues/12603",
    what="a parameter that is assigned after DDP was made is never reduced",
    names=_DRIFT,
    ranks=2,
)
def parameter_assigned_after_ddp(setting: Setting) -> RankTraining:
    training = _training(setting)

    def assign(t: RankTraining) -> None:
        t.model.head.weight = nn.Parameter(t.model.head.weight.detach().clone())

    training.options = {"find_unused_parameters": True}
    training.on_wrapped = assign
    return training


@reported(
    "pytorch/pytorch/issues/69031",
    what="DDP reduces only what the last of several micro-batches used",
    names=_DRIFT,
    ranks=2,
)
def unused_in_the_last_pass(setting: Setting) -> RankTraining:
    training = _training(setting)
    training.passes = 2

    def leave_out(t: RankTraining, _: int, number: int) -> None:
        layer = t.model.layers[1]
        if number == 1:
            layer.forward = lambda x: x
        else:
            vars(layer).pop("forward", None)

    def reduce_what_was_used(t: RankTraining, _: int) -> None:  # newer DDP reduces all of them
        for name, grad in t.gradients().items():
            if "layers.1." not in name:
                dist.all_reduce(grad)
                grad /= dist.get_world_size()

    def by_hand(t: RankTraining) -> None:
        t.ddp.require_backward_grad_sync = False

    training.on_wrapped = by_hand
    training.on_pass, training.on_gradients = leave_out, reduce_what_was_used
    return training


@reported(
    "pytorch/pytorch/issues/84803",
    "pytorch/pytorch/issues/132397",
    what="a copy from one device to another silently arrives as zeros",
    names=_DRIFT,
    onset=LATER,
    ranks=2,
)
def transfer_arrives_as_zeros(setting: Setting) -> RankTraining:
    training = _training(setting)

    def lose(t: RankTraining, step: int) -> None:
        if step >= LATER and step % 5 == 0 and t.rank == 1:
            next(iter(t.gradients().values())).zero_()

    training.on_gradients = lose
    return training


@reported(
    "deepspeedai/DeepSpeed/pull/1801",
    "bigscience-workshop/Megatron-DeepSpeed/pull/270",
    what="BF16_Optimizer clips the norms' weights, which ranks replicate, on rank 0 alone",
    names=_DRIFT,
    ranks=2,
)
def clipped_on_one_rank(setting: Setting) -> RankTraining:
    training = _training(setting)

    def clip(t: RankTraining) -> None:
        grads = t.gradients()
        total = torch.stack([g.norm() for g in grads.values()]).norm()
        for name, grad in grads.items():
            if t.rank == 0 or "norm" not in name:
                grad.mul_((0.3 / (total + 1e-6)).clamp(max=1.0))

    training.clips = clip
    return training


@reported(
    "huggingface/datasets/issues/5360",
    "huggingface/transformers/pull/11254",
    what="a stream is not split: all ranks train on the same rows",
    names=("same_data_on_ranks",),
    ranks=2,
)
def stream_not_split(setting: Setting) -> RankTraining:
    training = _training(setting)
    training.seed_of_rows = lambda seed, _: seed
    return training


@reported(
    "huggingface/transformers/issues/31412",
    what="one seed for all ranks gives all of them the same dropout masks",
    names=(),
    ranks=2,
)
def dropout_masks_are_equal(setting: Setting) -> RankTraining:
    training = _training(setting)

    def drop(t: RankTraining) -> None:
        for layer in t.model.layers:
            layer.register_forward_hook(lambda _, __, out: F.dropout(out, 0.1))

    training.on_model = drop
    return training


@reported(
    "NVIDIA/Megatron-LM/issues/7452",
    what="each rank divides its loss by its own number of labels, and ranks are averaged "
    "(finding 3)",
    names=(),
    ranks=2,
)
def divided_by_the_ranks_own_count(setting: Setting) -> RankTraining:
    training = _training(setting)

    def divide(t: RankTraining, logits: Tensor, wanted: Tensor) -> Tensor:
        if t.rank == 1:
            wanted = torch.where(torch.arange(len(wanted)) % 8 == 0, wanted, -100)
        return F.cross_entropy(logits, wanted)

    training.on_loss = divide
    return training
