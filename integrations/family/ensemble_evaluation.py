"""Members and ensemble measured on the same batches: sums over the data, and the records made from them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ast_plugin.errors import ConfigError
from ast_plugin.integrations.family.ensemble_measures import Calibration, auroc, log_mean, mutual_information
from ast_plugin.integrations.family.ensemble_records import EnsembleRecord, EnsembleReport

Split = Callable[[Any], tuple[Any, Tensor]]

_LABELS = ("labels", "label")


def labelled(loader: Iterable[Any], split: Split | None, max_batches: int | None) -> Iterator[tuple[Any, Tensor]]:
    """Yield inputs and labels of every batch.

    Args:
        loader: Batches: (inputs, labels), or mappings with ``labels`` or ``label``.
        split: Takes a batch to inputs and labels; None for the forms above.
        max_batches: How many; None takes all.

    Raises:
        ConfigError: If there is no batch, or one has another form; or `max_batches` is no number of batches.
    """
    if max_batches is not None and (
        isinstance(max_batches, bool) or not isinstance(max_batches, int) or max_batches < 1
    ):
        raise ConfigError(f"max_batches must be a number of batches, at least 1, or None for all, got {max_batches!r}")
    empty = True
    for batch in itertools.islice(iter(loader), max_batches):
        empty = False
        inputs, labels = (_split if split is None else split)(batch)
        if not isinstance(labels, Tensor):
            raise ConfigError(
                f"labels must be a tensor, got a {type(labels).__name__}; give split=..., which makes one"
            )
        yield inputs, labels
    if empty:
        raise ConfigError("loader gave no batch to evaluate; pass an iterable with at least one batch")


def _split(batch: Any) -> tuple[Any, Any]:
    if isinstance(batch, Mapping):
        for key in _LABELS:
            if key in batch:
                return {name: value for name, value in batch.items() if name != key}, batch[key]
        raise ConfigError(f"a batch of {', '.join(map(repr, batch))} has no 'labels'; give split=..., which tells them")
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return batch[0], batch[1]
    raise ConfigError(
        f"a batch must be (inputs, labels) or a mapping with 'labels', got a {type(batch).__name__}"
        f"{f' of {len(batch)}' if isinstance(batch, (tuple, list)) else ''}; give split=..., which takes it to "
        "inputs and labels"
    )


def arguments(inputs: Any, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments that a model is called with, positional and by name, with their tensors on a device.

    Args:
        inputs: A tensor (or any single argument), a tuple or list of positional arguments, or a mapping of keyword
            arguments.
        device: Where the model is.
    """
    if isinstance(inputs, Mapping):
        return (), {str(name): _moved(value, device) for name, value in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        return tuple(_moved(value, device) for value in inputs), {}
    return (_moved(inputs, device),), {}


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def device_of(model: nn.Module) -> torch.device:
    """Return where a model's first tensor is; the CPU for a model without any."""
    found = next(itertools.chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if found is None else found.device


def kept_weights(source: Any, name: str) -> int | None:
    """Return how many prunable weights a sub-net keeps; None if its source does not tell.

    Args:
        source: An elastic, a controller or a twin.
        name: The sub-net.
    """
    records = vars(source).get("records")
    if records is not None:
        return int(records[name].kept)
    masks = vars(source).get("masks")
    return None if masks is None else int(masks.kept(name))


class _Classes:
    """Sums of one member, or of the ensemble, over answers that are classes."""

    def __init__(self) -> None:
        self.nll = 0.0
        self.calibration = Calibration()
        self.right: list[Tensor] = []
        self.confidences: list[Tensor] = []

    def add(self, log_probabilities: Tensor, labels: Tensor) -> None:
        """Count predictions, (predictions, classes)."""
        confidences, answers = log_probabilities.max(dim=-1)
        right = answers == labels
        self.nll -= float(log_probabilities.gather(-1, labels[:, None]).double().sum())
        self.calibration.add(confidences.exp(), right)
        self.right.append(right.cpu())
        self.confidences.append(confidences.cpu())

    def figures(self, count: int) -> dict[str, float | None]:
        right = torch.cat(self.right)
        return {
            "accuracy": int(right.sum()) / count,
            "ece": self.calibration.error(),
            "nll": self.nll / count,
            "error_detection": auroc(-torch.cat(self.confidences), ~right),
        }


class _Numbers:
    """The same over answers that are numbers."""

    def __init__(self) -> None:
        self.squares = 0.0

    def add(self, values: Tensor, targets: Tensor) -> None:
        """Count predictions of the shape of their targets."""
        self.squares += float((values.double() - targets.double()).square().sum())

    def figures(self, count: int) -> dict[str, float | None]:
        return {"rmse": math.sqrt(self.squares / count)}


class Tally:
    """What an evaluation has found so far.

    Args:
        names: The members.
        ignore_index: The label of what does not count.
    """

    def __init__(self, names: Sequence[str], *, ignore_index: int) -> None:
        self._names = tuple(names)
        self._ignored = ignore_index
        self._sums: list[_Classes] | list[_Numbers] = []
        self._seconds = [0.0] * (len(names) + 1)
        self._count = self._seen = 0
        self._disagreement: list[Tensor] = []

    def add_times(self, members: Sequence[float], averaging: float) -> None:
        """Add the seconds that a batch took.

        Args:
            members: Of each member's forward pass.
            averaging: Of what came after them.
        """
        for index, seconds in enumerate((*members, sum(members) + averaging)):
            self._seconds[index] += seconds

    def add_classes(self, log_probabilities: Tensor, labels: Tensor) -> None:
        """Add a batch of a classification.

        Args:
            log_probabilities: (members, ..., classes).
            labels: Integers, (...).

        Raises:
            ConfigError: If the labels do not fit, or a member's predictions are NaN where they count.
        """
        shape, classes = tuple(log_probabilities.shape[1:-1]), log_probabilities.shape[-1]
        if tuple(labels.shape) != shape or labels.is_floating_point() or labels.dtype == torch.bool:
            raise ConfigError(
                f"labels must be classes, integers of shape {shape} as the outputs have it, got {labels.dtype} of "
                f"shape {tuple(labels.shape)}; give split=..., which makes them, or task='regression' for numbers"
            )
        self._seen += labels.numel()
        counted = labels != self._ignored
        kept, predictions = labels[counted].long(), log_probabilities[:, counted]
        if kept.numel() and not 0 <= int(kept.min()) <= int(kept.max()) < classes:
            raise ConfigError(
                f"labels must lie in [0, {classes}), as many classes as the model has outputs, or be "
                f"ignore_index={self._ignored}; got {int(kept.min())} to {int(kept.max())}"
            )
        undefined = predictions.isnan().flatten(1).any(dim=1).tolist()
        if any(undefined):
            names = ", ".join(repr(name) for name, is_nan in zip(self._names, undefined, strict=True) if is_nan)
            raise ConfigError(
                f"the predictions of {names} are NaN for some inputs, and have no accuracy or calibration; leave them "
                "out of names if they have diverged, or the inputs if these are NaN"
            )
        self._sums = self._sums or [_Classes() for _ in (*self._names, "ensemble")]
        for sums, own in zip(self._sums, (*predictions, log_mean(predictions)), strict=True):
            sums.add(own, kept)
        self._disagreement.append(mutual_information(predictions).cpu())
        self._count += kept.numel()

    def add_numbers(self, values: Tensor, targets: Tensor) -> None:
        """Add a batch of a regression.

        Args:
            values: (members, ...).
            targets: Numbers, as many as a member's output has.

        Raises:
            ConfigError: If the targets do not fit.
        """
        shape = tuple(values.shape[1:])
        if targets.numel() != values[0].numel() or targets.shape[:1] != values.shape[1:2]:
            raise ConfigError(
                f"labels must be as many numbers as the model returns, of shape {shape}, got shape "
                f"{tuple(targets.shape)}; give split=..., which makes them"
            )
        self._sums = self._sums or [_Numbers() for _ in (*self._names, "ensemble")]
        for sums, own in zip(self._sums, (*values, values.mean(dim=0)), strict=True):
            sums.add(own, targets.reshape(shape))
        self._disagreement.append(values.std(dim=0, correction=0).flatten().cpu())
        self._count += targets.numel()

    def report(self, source: Any) -> EnsembleReport:
        """Return what was found.

        Args:
            source: Where the sub-nets come from.

        Raises:
            ConfigError: If no prediction was counted.
        """
        if not self._count and not self._seen:
            raise ConfigError("no prediction was counted: there is none in the batches; give batches with inputs")
        if not self._count:
            raise ConfigError(f"no prediction was counted: every label is ignore_index={self._ignored}")
        kept = [kept_weights(source, name) for name in self._names]
        known = [number for number in kept if number is not None]
        kept.append(sum(known) if len(known) == len(kept) else None)
        passes = [1] * len(self._names) + [len(self._names)]
        records = tuple(
            EnsembleRecord(
                name=name,
                forward_passes=passes[index],
                seconds=self._seconds[index],
                kept_weights=kept[index],
                **self._sums[index].figures(self._count),
            )
            for index, name in enumerate((*self._names, "ensemble"))
        )
        disagreement = torch.cat(self._disagreement)
        if not isinstance(self._sums[-1], _Classes):
            return EnsembleReport(records=records, predictions=self._count, disagreement=_mean(disagreement) or 0.0)
        right = torch.cat(self._sums[-1].right)
        return EnsembleReport(
            records=records,
            predictions=self._count,
            disagreement=_mean(disagreement) or 0.0,
            disagreement_right=_mean(disagreement[right]),
            disagreement_wrong=_mean(disagreement[~right]),
            error_detection=auroc(disagreement, ~right),
        )


def _mean(values: Tensor) -> float | None:
    return float(values.double().mean()) if values.numel() else None
