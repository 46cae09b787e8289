"""A script's functions are found by name, wrapped, and called as the script calls them."""

from __future__ import annotations

import argparse
import types
from typing import Any

import pytest
import yaml
from timm_parts import network, sgd, step, task_of
from torch import nn

from ast_plugin.errors import ASTError
from ast_plugin.integrations.timm.seams import Script, SeamError

pytestmark = pytest.mark.extra("timm")

FLAGS = ("--ast-sparsities", "0.5", "0.8", "--ast-no-report")


class Loader:
    def __len__(self) -> int:
        return 5


def script(*arguments: str, **replaced: Any) -> types.ModuleType:
    """Return a module with the functions of a training script, which say what they were called with."""
    module = types.ModuleType("script")
    module.__file__ = "/x/train.py"
    parser = argparse.ArgumentParser()
    parser.add_argument("--eval-metric", default="top1")
    parser.add_argument("--grad-accum-steps", type=int, default=1)
    calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def parse() -> tuple[argparse.Namespace, str]:
        args = parser.parse_args(list(arguments))
        return args, yaml.safe_dump(vars(args), default_flow_style=False)

    def called(name: str, result: Any) -> Any:
        def function(*args: Any, **options: Any) -> Any:
            calls.append((name, args, options))
            return result

        return function

    def train_one_epoch(epoch, model, loader, optimizer, args, task=None, num_updates_total=None, **options):  # type: ignore[no-untyped-def]  # as timm has it
        calls.append(("train_one_epoch", (epoch, model, loader, optimizer, args), {"task": task, **options}))
        return {"loss": 1.0}

    module.__dict__.update(
        parser=parser,
        calls=calls,
        _parse_args=parse,
        create_optimizer_v2=lambda model, **options: sgd(model),
        train_one_epoch=train_one_epoch,
        validate=called("validate", {"loss": 1.0, "top1": 10.0}),
        main=called("main", None),
    )
    module.__dict__.update(replaced)
    return module


def test_flags_are_added_to_the_scripts_own_parser() -> None:
    module = script()
    Script(module)
    assert "--ast-sparsities" in module.parser.format_help()


def test_without_flags_nothing_is_changed_on_the_way() -> None:
    module = script("--eval-metric", "loss")
    text = module._parse_args()[1]
    wrapped = Script(module)
    args, again = module._parse_args()
    assert wrapped.run is None
    assert vars(args) == {"eval_metric": "loss", "grad_accum_steps": 1}
    assert again == text
    result = module.validate("model", "loader", "loss", args, log_suffix=" (EMA)")
    assert result == {"loss": 1.0, "top1": 10.0}
    assert module.train_one_epoch(0, "model", "loader", "optimizer", args, device="cpu") == {"loss": 1.0}
    assert module.calls == [
        ("validate", ("model", "loader", "loss", args), {"log_suffix": " (EMA)"}),
        ("train_one_epoch", (0, "model", "loader", "optimizer", args), {"task": None, "device": "cpu"}),
    ]
    wrapped.main()
    assert module.calls[-1] == ("main", (), {})


def test_a_run_begins_with_the_first_epoch_and_only_then() -> None:
    module = script(*FLAGS, "--grad-accum-steps", "2")
    wrapped = Script(module)
    args, _ = module._parse_args()
    run = wrapped.run
    assert run is not None
    model = network()
    task = task_of(model)
    optimizer = module.create_optimizer_v2(model, lr=0.1)
    assert run.ast is None
    assert module.validate(model, "loader") == {"loss": 1.0, "top1": 10.0}
    for epoch in range(2):
        module.train_one_epoch(epoch, model, Loader(), optimizer, args, task=task, num_updates_total=6)
    assert run.ast is not None
    assert (run.ast.config.total_steps, run.ast.config.steps_per_epoch) == (6, 3)  # the last update has one batch
    step(task, optimizer, 0)
    assert run.ast.step == 1
    assert list(module.validate(model, "loader"))[2:4] == ["s50_loss", "s50_top1"]


def test_arguments_by_name_or_place_are_the_same() -> None:
    module = script(*FLAGS)
    wrapped = Script(module)
    args, _ = module._parse_args()
    model = network()
    module.train_one_epoch(
        epoch=1,
        model=model,
        loader=Loader(),
        optimizer=sgd(model),
        args=args,
        task=task_of(model),
        num_updates_total=15,
    )
    assert wrapped.run is not None
    assert wrapped.run.ast is not None
    assert wrapped.run.ast.config.total_steps == 10  # what is left after the first epoch


@pytest.mark.parametrize("name", ["_parse_args", "create_optimizer_v2", "train_one_epoch", "validate", "main"])
def test_a_missing_function_is_an_error_that_names_it(name: str) -> None:
    with pytest.raises(SeamError) as error:
        Script(script(**{name: None}))
    assert str(error.value).startswith(f"/x/train.py has no function {name}(), so sub-nets cannot be trained with it")
    assert "timm 1." in str(error.value)
    assert isinstance(error.value, ASTError)


@pytest.mark.parametrize("parser", [None, "parser"])
def test_a_missing_parser_is_an_error(parser: object) -> None:
    with pytest.raises(SeamError, match=r"has no argparse\.ArgumentParser named parser"):
        Script(script(parser=parser))


@pytest.mark.parametrize("result", [None, argparse.Namespace(), (1, 2), (argparse.Namespace(),)])
def test_arguments_in_another_form_are_an_error(result: object) -> None:
    module = script(_parse_args=lambda: result)
    Script(module)
    with pytest.raises(SeamError, match=r"_parse_args\(\) that does not return arguments and their text"):
        module._parse_args()


def test_an_epoch_without_the_number_of_updates_is_an_error() -> None:
    module = script(*FLAGS)
    Script(module)
    args, _ = module._parse_args()
    model = network()
    with pytest.raises(SeamError, match=r"calls train_one_epoch\(\) without num_updates_total"):
        module.train_one_epoch(0, model, Loader(), sgd(model), args)


def test_an_optimizer_of_parameters_is_an_error() -> None:
    module = script(*FLAGS, create_optimizer_v2=lambda parameters, **options: sgd(nn.Linear(1, 1)))
    Script(module)
    module._parse_args()
    with pytest.raises(SeamError, match="something else than the model"):
        module.create_optimizer_v2(list(network().parameters()))


def test_wrapped_functions_keep_their_signatures() -> None:
    module = script()
    original = module.train_one_epoch
    Script(module)
    assert module.train_one_epoch.__wrapped__ is original
