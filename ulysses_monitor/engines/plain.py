"""Plain torch: one process with the full parameters, any precision, with or without GradScaler."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler, OptState

from ulysses_monitor.common.patching import Undo, patch_method, undo_all
from ulysses_monitor.engines.base import Replica, Shard, StepCallback, do_nothing
from ulysses_monitor.engines.parameter_view import ParameterView
from ulysses_monitor.engines.support import defer, select_state

__all__ = ["PlainEngine", "full_shards", "step_count"]


class PlainEngine(ParameterView):
    """View of a model and a `torch.optim.Optimizer`; base of the engines that keep ``param.grad``.

    Args:
        model: the model, wrapped or not.
        optimizer: the optimizer that owns the parameters.
        scaler: the `GradScaler` that steps the optimizer, if any.
        clip_norm: returns the norm that the caller will clip to, for `grad/clip_coef/total`.

    Raises:
        InputError: the model has no trainable parameters.
    """

    name = "plain"
    group: dist.ProcessGroup | None = None
    replica_sets = 0
    replica_set = 0
    clips_in_step = False
    replicates_gradients = True

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        scaler: GradScaler | None = None,
        clip_norm: Callable[[], float | None] | None = None,
    ) -> None:
        super().__init__(model, optimizer)
        self._scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self.clip_norm = clip_norm or (lambda: None)
        self.device = self._named[0][1].device
        self._arrange()

    def _arrange(self) -> None:
        groups = self.optimizer.param_groups
        self._settings = {param: group for group in groups for param in group["params"]}
        self._counted = frozenset(self.counted_indices())

    def counted_indices(self) -> list[int]:
        """See `Engine.counted_indices`."""
        if dist.is_available() and dist.is_initialized() and dist.get_rank() != 0:
            return []  # something else keeps the replicas equal, so rank 0 counts for all
        return list(range(len(self._named)))

    def shards(self) -> Iterator[Shard]:
        """See `Engine.shards`."""
        return full_shards(self._named, self.optimizer, self._settings, self._counted)

    def replicas(self) -> Iterator[Replica]:
        """See `Engine.replicas`."""
        return iter(())

    def grad_scale(self) -> Tensor | float:
        """See `Engine.grad_scale`; 1 once the caller has unscaled the gradients."""
        if self._scaler is None:
            return 1.0
        # A tensor on the device: GradScaler's own get_scale() would make the host wait for it.
        scale = self._scaler._get_scale_async()
        states = self._scaler._per_optimizer_states
        # Reading a missing entry would create it and change what the scaler's own step does.
        unscaled = id(self.optimizer) in states and (
            states[id(self.optimizer)]["stage"] is OptState.UNSCALED
        )
        return 1.0 if unscaled or scale is None else scale

    def loss_scale(self) -> Tensor | float:
        """See `Engine.loss_scale`; GradScaler changes it after the step."""
        scale = None if self._scaler is None else self._scaler._get_scale_async()
        return 1.0 if scale is None else scale

    def hook_step(
        self,
        before: Callable[[], None],
        after: StepCallback,
        ended: Callable[[], None] = do_nothing,
    ) -> Undo:
        """Hooks `optimizer.step()`, or `GradScaler.step()`, which skips the former on an overflow.

        Callers that clip must read the gradients before that, see `Monitor.before_clip`.
        """
        if self._scaler is None:

            def finish() -> None:
                after(True)
                ended()

            return self._hook_optimizer(before, finish)
        stepped = False

        def note_step() -> None:
            nonlocal stepped
            stepped = True

        def step(original: Callable[..., Any], optimizer: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal stepped
            if optimizer is not self.optimizer:
                return original(optimizer, *args, **kwargs)
            if args and callable(args[0]):  # torch refuses a closure, but only by keyword
                return original(optimizer, closure=args[0])
            if "closure" in kwargs:
                return original(optimizer, *args, **kwargs)
            stepped = False
            before()
            result = original(optimizer, *args, **kwargs)
            after(stepped)
            ended()
            return result

        undos = [
            self._hook_optimizer(lambda: None, note_step),
            patch_method(self._scaler, "step", step),
        ]
        return lambda: undo_all(undos)

    def _hook_optimizer(self, before: Callable[[], None], after: Callable[[], None]) -> Undo:
        """Hooks the optimizer's outermost step: `super().step()` inside a step runs hooks too.

        A closure makes the step's gradients, so `before` waits until it has run.
        """
        kinds = [k for k in type(self.optimizer).__mro__ if k is not torch.optim.Optimizer]
        most = max(1, sum("step" in vars(kind) for kind in kinds))
        depth = 0

        def enter(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            nonlocal depth
            depth = depth % most + 1  # a step that raised never left
            return defer(before, args, kwargs) if depth == 1 else None

        def leave(*_: Any) -> None:
            nonlocal depth
            depth -= 1
            if depth == 0:
                after()

        pre = self.optimizer.register_step_pre_hook(enter)
        post = self.optimizer.register_step_post_hook(leave)

        def undo() -> None:
            pre.remove()
            post.remove()

        return undo


def full_shards(
    named: Sequence[tuple[str, nn.Parameter]],
    optimizer: torch.optim.Optimizer,
    settings: Mapping[Tensor, Mapping[str, Any]],
    counted: Collection[int],
) -> Iterator[Shard]:
    """Yields the shards of parameters that this rank holds in full and the optimizer updates.

    Args:
        named: the trainable parameters.
        optimizer: the optimizer.
        settings: the parameter group of each parameter.
        counted: indices of the parameters that this rank counts.
    """
    for i, (_, param) in enumerate(named):
        state = optimizer.state.get(param, {})
        yield Shard(
            i,
            0,
            param.detach(),
            param.grad,
            select_state(state, param),
            settings.get(param, {}),
            step_count(state),
            is_counted=i in counted,
            has_state=bool(state),
        )


def step_count(state: Mapping[str, Any]) -> Tensor | float | None:
    """Returns the step count that the optimizer keeps in `state`, or None."""
    steps = state.get("step")
    return steps if isinstance(steps, Tensor | float | int) else None
