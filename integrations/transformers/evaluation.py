"""Evaluation of every sub-net by the Trainer's own method: one mapping of metrics, one log entry, one event."""

from __future__ import annotations

import contextlib
import inspect
import numbers
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from transformers import Trainer

from ast_plugin.integrations.family.sup_tickets_hosts import further_versions
from ast_plugin.training import AlternatingSparseTraining

_PREFIX = "metric_key_prefix"
_PREFIX_PLACE = 2  # among the arguments of Trainer.evaluate; subclasses may have others
# What the Trainer measures of itself; once is enough.
_OF_THE_LOOP = re.compile(
    r"runtime|samples_per_second|steps_per_second|tokens_per_second|model_preparation_time|jit_compilation_time|mem_.*"
)
_OF_THE_MOMENT = ("epoch", "num_input_tokens_seen", "total_flos")  # what the Trainer adds to every entry of its log


def evaluate_each(
    trainer: Trainer,
    ast: AlternatingSparseTraining,
    evaluate: Callable[..., dict[str, float]],
    *args: Any,
    **options: Any,
) -> dict[str, float]:
    """Evaluate every sub-net as ``trainer.evaluate(*args, **options)`` evaluates the model.

    The Trainer logs and reports once, when all are evaluated, so that its callbacks find every metric in one place.

    Args:
        trainer: The Trainer.
        ast: Its run.
        evaluate: Its own method, with what subclasses add.
        *args: Arguments of ``Trainer.evaluate``.
        **options: Arguments of ``Trainer.evaluate``.

    Returns:
        The default sub-net's metrics under the Trainer's names (``eval_loss``), then those of each sub-net
        (``eval_s90_loss``) with its sparsity (``eval_s90_sparsity``, in [0, 1]), and those of further versions of the
        sub-nets, where there are any (``eval_s90_superposed_loss``). Inside ``with sub_net(...)`` the
        metrics of that one, under the Trainer's names.
    """
    given = args[0] if args else options.get("eval_dataset")
    data = trainer.eval_dataset if given is None else given
    if ast.chosen is not None or isinstance(data, Mapping):  # of several sets each comes here by itself
        return evaluate(*args, **options)
    ast.synchronize_normalization()
    place = _place_of_prefix(evaluate)
    prefix = str(options.get(_PREFIX, "eval") if place is None or len(args) <= place else args[place])
    by_sub_net: dict[str, Mapping[str, float]] = {}
    with _held_back(trainer) as logged:
        for name in (ast.default_sub_net, *(n for n in ast.sub_nets if n != ast.default_sub_net)):
            own = prefix if name == ast.default_sub_net else f"{prefix}_{name}"
            with ast.sub_net(name):
                figures = _call(evaluate, args, options, own, place)
            by_sub_net[name] = _without_prefix({**logged, **figures}, own, prefix)
            logged.clear()
        metrics = merged(prefix, ast, by_sub_net)
        for version in further_versions(ast):
            with ast.version(version):
                for name in ast.sub_nets:
                    own = f"{prefix}_{name}_{version}"
                    with ast.sub_net(name):
                        figures = _call(evaluate, args, options, own, place)
                    found = _without_prefix({**logged, **figures}, own, prefix)
                    logged.clear()
                    metrics |= _of_sub_net(prefix, ast, name, found, f"{name}_{version}")
    trainer.log(metrics)
    trainer.control = trainer.callback_handler.on_evaluate(trainer.args, trainer.state, trainer.control, metrics)
    return metrics


def merged(
    prefix: str, ast: AlternatingSparseTraining, by_sub_net: Mapping[str, Mapping[str, float]]
) -> dict[str, float]:
    """Return one mapping of all metrics, and note those of each sub-net for the report and the elastic file.

    Args:
        prefix: What the Trainer puts before the names of metrics.
        ast: The run.
        by_sub_net: Metrics of every sub-net, without prefix.
    """
    metrics = {f"{prefix}_{metric}": value for metric, value in by_sub_net[ast.default_sub_net].items()}
    for name in ast.sub_nets:
        metrics |= _of_sub_net(prefix, ast, name, by_sub_net[name], name)
    return metrics


def _of_sub_net(
    prefix: str, ast: AlternatingSparseTraining, name: str, figures: Mapping[str, float], called: str
) -> dict[str, float]:
    """Return the metrics of one sub-net by the names that they are logged under, and note them."""
    metrics = {}
    for metric, value in figures.items():
        if _OF_THE_LOOP.fullmatch(metric):
            continue
        metrics[f"{prefix}_{called}_{metric}"] = value
        if isinstance(value, numbers.Real):
            ast.add_report_metric(f"{prefix}_{metric}".removeprefix("eval_"), float(value), sub_net=name)
    metrics.setdefault(f"{prefix}_{called}_sparsity", ast.masks.sparsity(name))  # unless it is a metric of the user's
    return metrics


@contextlib.contextmanager
def _held_back(trainer: Trainer) -> Iterator[dict[str, float]]:
    """Keep what the Trainer logs and reports of evaluations to itself for the length of a block.

    Yields:
        What it has logged: Trainers of other libraries add metrics there that they do not return.
    """
    handler, log_history = trainer.callback_handler, trainer.state.log_history
    logged: dict[str, float] = {}
    entries = len(log_history)

    def on_log(args: Any, state: Any, control: Any, logs: Mapping[str, float]) -> Any:
        del log_history[entries:]
        logged.update(logs)
        return control

    def on_evaluate(args: Any, state: Any, control: Any, metrics: Mapping[str, float]) -> Any:
        for callback in handler.callbacks:
            if getattr(callback, "prediction_bar", None) is not None:  # it counts the batches of one evaluation
                callback.on_predict(args, state, control)
        return control

    with _replaced(handler, "on_log", on_log), _replaced(handler, "on_evaluate", on_evaluate):
        yield logged


@contextlib.contextmanager
def _replaced(thing: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    before = vars(thing).get(name)
    setattr(thing, name, function)
    try:
        yield
    finally:
        if before is None:
            delattr(thing, name)
        else:
            setattr(thing, name, before)


def _without_prefix(metrics: Mapping[str, float], own: str, prefix: str) -> dict[str, float]:
    """Return metrics by their bare names; of the two prefixes, `own` is the one that was asked for.

    Where a ``compute_metrics`` has put the usual prefix before names by itself, the Trainer has added `own` to it.
    """
    found = {}
    for key, value in metrics.items():
        name = (key if own == prefix else key.removeprefix(f"{own}_")).removeprefix(f"{prefix}_")
        if name not in _OF_THE_MOMENT:
            found[name] = value
    return found


def _place_of_prefix(evaluate: Callable[..., Any]) -> int | None:
    """Return where a Trainer's ``evaluate`` takes the prefix; a place past all where it is taken by name alone.

    Returns:
        The place among arguments without names, None where it takes no prefix at all.
    """
    parameters = inspect.signature(evaluate).parameters
    if _PREFIX in parameters:
        named = parameters[_PREFIX].kind is inspect.Parameter.KEYWORD_ONLY
        return sys.maxsize if named else list(parameters).index(_PREFIX)
    kinds = {parameter.kind for parameter in parameters.values()}
    if inspect.Parameter.VAR_KEYWORD not in kinds:
        return None
    return _PREFIX_PLACE if inspect.Parameter.VAR_POSITIONAL in kinds else sys.maxsize


def _call(
    evaluate: Callable[..., dict[str, float]],
    args: tuple[Any, ...],
    options: dict[str, Any],
    prefix: str,
    place: int | None,
) -> dict[str, float]:
    if place is None:  # its metrics have the usual prefix
        return evaluate(*args, **options)
    if len(args) > place:
        return evaluate(*args[:place], prefix, *args[place + 1 :], **options)
    return evaluate(*args, **{**options, _PREFIX: prefix})
