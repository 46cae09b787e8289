"""The moving average of a timm script, evaluated as every sub-net."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from ast_plugin.distributed import average_over_ranks, ranks
from ast_plugin.errors import ConfigError
from ast_plugin.integrations.timm.networks import network_in
from ast_plugin.slots import bare_model
from ast_plugin.training import AlternatingSparseTraining
from ast_plugin.twins import Twin


class RunAverage:
    """A `timm.utils.ModelEmaV3` (or an older kind) beside a run, which averages private BatchNorm state with it.

    The average itself holds dense weights and the default's BatchNorm. Those of the other sub-nets are averaged here,
    with the same decay, whenever the script updates its average.

    Args:
        ast: The run.
        average: The script's average, compiled or not.
        state: What `state_dict` returned in an earlier part of the run; None starts from the run's present BatchNorm.

    Attributes:
        network: The network that the average holds.
        twin: What puts sub-nets on it.

    Raises:
        ConfigError: If it is no such average.
        StateError: If the state belongs to another run.
    """

    def __init__(self, ast: AlternatingSparseTraining, average: nn.Module, state: Mapping[str, Any] | None) -> None:
        holder: Any = bare_model(average)
        if not callable(getattr(holder, "update", None)) or not hasattr(holder, "decay"):
            raise ConfigError(
                f"--model-ema: a {type(holder).__name__} has no update() and decay as the averages of timm have; "
                "train without it"
            )
        self._ast = ast
        self.network = network_in(holder)
        self.twin: Twin = ast.twin(self.network)
        if state is not None:
            self.twin.load_state_dict(state)
        update = holder.update

        @functools.wraps(update)
        def update_both(*args: Any, **options: Any) -> Any:
            result = update(*args, **options)
            step = options.get("step", args[1] if len(args) > 1 else None)
            self.twin.update(decay=_decay(holder, step))
            return result

        object.__setattr__(holder, "update", update_both)

    def sub_net(self, name: str) -> AbstractContextManager[nn.Module]:
        """Put a sub-net on the average for the length of a ``with`` block."""
        return self.twin.sub_net(name)

    def synchronize(self) -> None:
        """Average the running statistics that are kept here over all ranks, as scripts do with the average's own.

        A collective; does nothing in a single process.
        """
        if ranks(self._ast.model) == 1:
            return
        state = self.twin.state_dict()
        for name, tensors in state["private"].items():
            present = self._ast.private_state(name)  # on the device that ranks talk with; the average may be elsewhere
            statistics = {
                key: tensor.to(present[key].device, copy=True)
                for key, tensor in tensors.items()
                if key.endswith(("running_mean", "running_var"))
            }
            average_over_ranks(statistics, like=dict(statistics), model=self._ast.model)
            tensors.update(statistics)
        self.twin.load_state_dict(state)

    def state_dict(self) -> dict[str, Any]:
        """Return what is averaged here, as tensors and plain containers."""
        return self.twin.state_dict()


def _decay(holder: Any, step: Any) -> float:
    # The third version warms the decay up; older ones have a constant.
    get_decay = getattr(holder, "get_decay", None)
    return float(get_decay(step) if callable(get_decay) else holder.decay)
