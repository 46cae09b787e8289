"""An ensemble of the sub-nets of one run: averaged predictions, with the members' disagreement as an uncertainty.

One training run yields several networks that share weights, and their predictions can be averaged like those of
networks that were trained apart.

Source: Liu et al.: "Deep Ensembling with No Overhead for either Training or Testing: The All-Round Blessings of Dynamic
Sparsity" (FreeTickets), ICLR 2022. There the members are sparse networks that one run passes through one after the
other; here they are sub-nets that one run trains in turn.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from time import perf_counter
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ast_plugin.errors import ConfigError
from ast_plugin.integrations.family.ensemble_evaluation import Split, Tally, arguments, device_of, labelled
from ast_plugin.integrations.family.ensemble_measures import dissent, log_mean, mutual_information
from ast_plugin.integrations.family.ensemble_outputs import Pick, class_place, picked, placed, warn_of_probabilities
from ast_plugin.integrations.family.ensemble_records import EnsembleReport
from ast_plugin.profiles_measure import Clock, waiting
from ast_plugin.sub_nets import check_names, check_sub_net

TASKS = ("classification", "regression")

# One model is one sub-net at a time: all ensembles of a model take turns.
_locks: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()
_locks_lock = threading.Lock()


class SubNets(Protocol):
    """What can be each of its sub-nets: an `ast_plugin.Elastic`, a controller, a twin."""

    model: nn.Module

    @property
    def sub_nets(self) -> Sequence[str]:
        """Names of the sub-nets."""

    def sub_net(self, name: str) -> contextlib.AbstractContextManager[nn.Module]:
        """Make the model a sub-net for the length of a ``with`` block."""


def ensemble(
    source: SubNets,
    names: Sequence[str] | None = None,
    *,
    task: str = "classification",
    pick: Pick | None = None,
    class_dim: int | None = None,
) -> Ensemble:
    """Return an ensemble of sub-nets; ``elastic.ensemble(...)`` does the same.

    Args:
        source: What `ast_plugin.load` or `ast_plugin.wrap` returned, or a twin of a run. During a call of the ensemble
            its model must not be used otherwise, nor a sub-net be put on.
        names: The members, at least one; None takes all sub-nets.
        task: ``classification`` averages probabilities, ``regression`` the outputs themselves.
        pick: Takes what the model returns to the tensor that is averaged: logits, or numbers. None takes a tensor, what
            is called ``logits`` of an object or mapping, or the one item of a tuple.
        class_dim: The dimension of the logits that counts the classes. None: the last one of (examples, classes), and
            of the (examples, tokens, classes) of a Hugging Face model.

    Raises:
        ConfigError: If `source` has no sub-nets, a name is unknown or comes twice, there is none, or another argument
            is out of range.
    """
    return Ensemble(source, names, task=task, pick=pick, class_dim=class_dim)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EnsemblePrediction:
    """What the members of an ensemble say of some inputs.

    Attributes:
        members: Names of the sub-nets.
        predictions: Probabilities, in regression outputs, of every member: (members, ...) before the shape of the
            model's output. Float32 at least.
        mean: Their average, of the shape of the model's output.
        disagreement: In classification the mutual information of member and class, in nats, in [0, log(members)], of
            the output's shape without the classes; in regression the standard deviation over the members (divided by
            their number), of the output's shape.
        dissent: Share of members whose class is not that of the vote, in [0, 1 - 1 / members]; None in regression.
    """

    members: tuple[str, ...]
    predictions: Tensor
    mean: Tensor
    disagreement: Tensor
    dissent: Tensor | None = None


class Ensemble(nn.Module):
    """A module that answers with the averaged predictions of several sub-nets; `ensemble` makes it.

    It is called like the model, and answers in the model's form: in classification with the *logarithms* of the
    averaged probabilities, which are logits whose softmax is the average, so that the ensemble stands wherever the
    model stood; in regression with the averaged outputs. Of outputs with ``logits`` these alone come back.

    Every call runs the model once as each member, in eval mode and without gradients. Afterwards the model is the
    sub-net that it was, in the modes that its parts had, also after an exception. Calls from several threads take
    turns. Inputs that the model writes into, such as caches of keys and values, would pass from member to member.

    `train` does nothing: an ensemble is not trained. `to` moves the model. The `state_dict` is that of the active
    sub-net alone; the elastic file is what keeps an ensemble.

    Attributes:
        model: The model of the source.
        names: Names of the members.
        task: ``classification`` or ``regression``.
    """

    def __init__(
        self,
        source: SubNets,
        names: Sequence[str] | None = None,
        *,
        task: str = "classification",
        pick: Pick | None = None,
        class_dim: int | None = None,
    ) -> None:
        super().__init__()
        if not (isinstance(getattr(source, "model", None), nn.Module) and callable(getattr(source, "sub_net", None))):
            raise ConfigError(
                f"an ensemble is made of what ast_plugin.load() or wrap() returned, got a {type(source).__name__}"
            )
        check_names("names", names)
        chosen = tuple(source.sub_nets if names is None else names)
        for index, name in enumerate(chosen):
            check_sub_net(name, source.sub_nets)
            if name in chosen[:index]:
                raise ConfigError(f"names has {name!r} twice; a member counts once, remove one of them")
        if task not in TASKS:
            raise ConfigError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
        if pick is not None and not callable(pick):
            raise ConfigError(f"pick must be a function of what the model returns, got {pick!r}")
        if class_dim is not None and (not isinstance(class_dim, int) or isinstance(class_dim, bool)):
            raise ConfigError(f"class_dim must be an integer such as 1, got {class_dim!r}")
        self.names = chosen
        self.task = task
        self.model = source.model
        self._source = source
        self._pick = pick
        self._class_dim = class_dim
        self._looked_at = False  # whether the outputs are what they are taken for
        self.training = False

    def train(self, mode: bool = True) -> Ensemble:
        """Return the ensemble as it is: it always predicts, and the model's own mode is left alone.

        Args:
            mode: Has no effect.
        """
        del mode
        return self

    def extra_repr(self) -> str:
        """Return the members, for `repr`."""
        return f"names={self.names!r}, task={self.task!r}"

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the average in the form of the model's output.

        Args:
            *args: What the model takes.
            **kwargs: What the model takes.

        Raises:
            ConfigError: If the model's outputs cannot be averaged.
        """
        members = self._members(args, kwargs)
        return placed(self._average(members).to(members.dtype), members.output, self._pick)

    @torch.no_grad()
    def predict(self, *args: Any, **kwargs: Any) -> EnsemblePrediction:
        """Return what every member says, the average, and how far the members disagree.

        Args:
            *args: What the model takes.
            **kwargs: What the model takes.

        Raises:
            ConfigError: If the model's outputs cannot be averaged.
        """
        members = self._members(args, kwargs)
        values, dim = members.values, members.dim
        if self.task == "regression":
            return EnsemblePrediction(
                members=self.names,
                predictions=values,
                mean=values.mean(dim=0),
                disagreement=values.std(dim=0, correction=0),
            )
        return EnsemblePrediction(
            members=self.names,
            predictions=values.exp().movedim(-1, dim + 1),
            mean=log_mean(values).exp().movedim(-1, dim),
            disagreement=mutual_information(values),
            dissent=dissent(values.argmax(dim=-1)),
        )

    @torch.no_grad()
    def evaluate(
        self,
        loader: Iterable[Any],
        *,
        split: Split | None = None,
        max_batches: int | None = None,
        ignore_index: int = -100,
        clock: Clock = perf_counter,
    ) -> EnsembleReport:
        """Measure every member and the ensemble on the same data, in one pass over it.

        Args:
            loader: Batches: (inputs, labels), or a mapping of keyword arguments with ``labels`` or ``label``. Inputs
                are a tensor, a tuple of positional arguments or a mapping of keyword arguments. Labels are classes, of
                the shape of the output without the classes; in regression numbers, as many as the model returns. All
                are moved to the model's device.
            split: Takes a batch to inputs and labels, for batches of other forms.
            max_batches: How many batches to use; None takes all.
            ignore_index: The label of what does not count, as in `torch.nn.functional.cross_entropy`.
            clock: Seconds that pass.

        Returns:
            Figures of every member and of the ensemble. The times leave out a first pass over the first batch.

        Raises:
            ConfigError: If there is no batch, or one has no labels that fit the outputs; or the outputs cannot be
                averaged.
        """
        tally = Tally(self.names, ignore_index=ignore_index)
        add = tally.add_numbers if self.task == "regression" else tally.add_classes
        device, finish = device_of(self.model), waiting(self.model)
        warm = False
        for inputs, labels in labelled(loader, split, max_batches):
            args, kwargs = arguments(inputs, device)
            if not warm:
                self._members(args, kwargs)
                warm = True
            members = self._members(args, kwargs, clock, finish)
            started = clock()
            self._average(members)
            finish()
            tally.add_times(members.seconds, clock() - started)
            add(members.values, labels.to(device))
        return tally.report(self._source)

    def _average(self, members: _Members) -> Tensor:
        """Return the averaged outputs or the logarithms of the averaged probabilities, of the shape of the output."""
        if self.task == "regression":
            return members.values.mean(dim=0)
        return log_mean(members.values).movedim(-1, members.dim)

    def _members(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        clock: Clock = perf_counter,
        finish: Callable[[], None] | None = None,
    ) -> _Members:
        """Run the model as each member; `finish` waits for an accelerator, where time is measured."""
        values: list[Tensor] = []
        seconds: list[float] = []
        with _lock_of(self.model), _evaluating(self.model):
            for name in self.names:
                started = clock()
                with self._source.sub_net(name):
                    output = self.model(*args, **kwargs)
                    # At once: what the model returns may be memory that its next call writes into.
                    value, dim, dtype = self._value(output)
                if finish is not None:
                    finish()
                seconds.append(clock() - started)
                if values and value.shape != values[0].shape:
                    raise ConfigError(
                        f"sub-net {name!r} returns shape {tuple(value.shape)} and {self.names[0]!r} "
                        f"{tuple(values[0].shape)} for the same inputs; outputs of different shapes have no average"
                    )
                values.append(value)
        return _Members(torch.stack(values), dim, dtype, output, seconds)

    def _value(self, output: Any) -> tuple[Tensor, int, torch.dtype]:
        """Return numbers, or logarithms of probabilities with the classes last; where they were; the output's dtype."""
        scores = picked(output, self._pick)
        wide = scores if scores.dtype == torch.float64 else scores.float()
        if self.task == "regression":
            return wide.clone() if wide is scores else wide, 0, scores.dtype
        dim = class_place(scores, self._class_dim, output)
        if not self._looked_at:
            warn_of_probabilities(wide, dim)
            self._looked_at = True
        return torch.log_softmax(wide, dim).movedim(dim, -1), dim, scores.dtype


@dataclasses.dataclass(frozen=True)
class _Members:
    """What the members returned: stacked values, where the classes were, the outputs' dtype, the last one, times."""

    values: Tensor
    dim: int
    dtype: torch.dtype
    output: Any
    seconds: list[float]


def _lock_of(model: nn.Module) -> threading.RLock:
    with _locks_lock:
        return _locks.setdefault(model, threading.RLock())


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode for the length of a block; afterwards every part has the mode that it had."""
    training = [module for module in model.modules() if module.training]
    if not training:
        yield
        return
    try:
        model.eval()
        yield
    finally:
        for module in training:
            module.training = True
