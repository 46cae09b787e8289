"""The main job: one training run on real images yields several sparse networks, shown in a table, a page and a file.

Steps: load the digits, train (or go on with an interrupted run), evaluate every sub-net, write the elastic file and
the report, and say what to do with them. Ctrl-C ends the run after the step in progress, with its state on disk.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TextIO

import torch

from ast_plugin.demo_data import TEST_IMAGES, TEST_VIEWS, TRAIN_IMAGES, load_digits
from ast_plugin.demo_progress import progress
from ast_plugin.demo_run import DemoRun, read_state
from ast_plugin.demo_settings import DemoSettings
from ast_plugin.elastic_file import ELASTIC
from ast_plugin.errors import ConfigError, MissingExtraError, StateError
from ast_plugin.report import Report

DEFAULT_OUTPUT = Path("demo-run")
CHECKPOINT = "checkpoint.pt"
PAGE = "report.html"
NUMBERS = "report.json"


class DemoInterrupted(KeyboardInterrupt):
    """The run was stopped by Ctrl-C; the message says where its state is and how to go on."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoResult:
    """What a finished run left.

    Attributes:
        report: Everything that can be said about the run.
        elastic: The file with all sub-nets.
        page: The report as a page; None if matplotlib is not installed.
        numbers: The report as JSON.
        run: The run itself, with model and controller.
    """

    report: Report
    elastic: Path
    page: Path | None
    numbers: Path
    run: DemoRun


def run_demo(
    settings: DemoSettings | None = None,
    *,
    output: Path = DEFAULT_OUTPUT,
    resume: bool = False,
    given: frozenset[str] | None = None,
    checkpoint_every: int = 100,
    out: TextIO | None = None,
) -> DemoResult:
    """Train, evaluate and report; everything goes into one folder.

    Args:
        settings: What to compute; None takes the defaults, or with `resume` those of the interrupted run.
        output: Folder of the results and of the state.
        resume: Whether to go on with the run whose state is in `output`.
        given: Names of the settings that must agree with the resumed run's; None takes all of `settings`.
        checkpoint_every: Steps between two writings of the state.
        out: Where to print; None takes standard output.

    Returns:
        The report and where the files are.

    Raises:
        ConfigError: If a setting is outside its range, or contradicts the run to resume.
        StateError: If there is nothing to resume, or it is damaged.
        SaveError: If a file cannot be written.
        MissingExtraError: If scikit-learn is not installed.
        DemoInterrupted: If the user pressed Ctrl-C; the state of the last step is on disk.
    """
    if checkpoint_every < 1:
        raise ConfigError(f"checkpoint_every must be a positive number of steps, got {checkpoint_every!r}")
    stream = sys.stdout if out is None else out
    state = output / CHECKPOINT
    if resume:
        run = _resumed(state, settings, given)
        print(f"Going on after step {run.step} of {run.settings.steps} ({state})", file=stream)
    else:
        run = DemoRun(settings or DemoSettings(), load_digits())
        _set_aside_unfinished(state, stream)
        run.save(state)  # also shows before training, not after it, that the folder can be written to
    print(_introduction(run), file=stream, flush=True)
    with _threads(run.settings.threads):
        if not run.finished:
            _train(run, state, checkpoint_every, stream)
        try:
            print("Evaluating every sub-net ...", file=stream, flush=True)
            run.evaluate()
            result = _write_results(run, output, stream)
        except KeyboardInterrupt:
            raise DemoInterrupted(_how_to_go_on(run.step, run.settings.steps, state)) from None
    print(_summary(result), file=stream, flush=True)
    return result


def _train(run: DemoRun, state: Path, checkpoint_every: int, out: TextIO) -> None:
    """Do the remaining steps; write the state every so often, at the end, and when the user asks to stop."""
    targets = {spec.name: spec.sparsity for spec in run.ast.config.sub_nets}
    display = progress(out, steps=run.settings.steps, done=run.step, targets=targets)
    before, began = run.elapsed_seconds, time.monotonic()
    saved = run.step
    try:
        with stop_on_interrupt() as stop, display:
            while not run.finished and not stop.is_set():
                result = run.train_step()
                run.elapsed_seconds = before + time.monotonic() - began
                display.update(
                    run.step,
                    sub_net=result.sub_net,
                    loss=result.loss,
                    sparsities={name: run.ast.masks.sparsity(name) for name in run.ast.sub_nets},
                )
                if run.step % checkpoint_every == 0:
                    run.save(state)
                    saved = run.step
            if saved != run.step:
                run.save(state)
                saved = run.step
    except KeyboardInterrupt:
        # The second Ctrl-C, or a first one where no handler could be set: the step in progress is lost.
        raise DemoInterrupted(_how_to_go_on(saved, run.settings.steps, state)) from None
    if not run.finished:
        raise DemoInterrupted(_how_to_go_on(run.step, run.settings.steps, state))


@contextlib.contextmanager
def stop_on_interrupt() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C into a flag, so that the step in progress ends well; the second one interrupts at once.

    Outside the main thread no handler can be set: there Ctrl-C interrupts at once, as ever.
    """
    stop = threading.Event()

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.signal(signal.SIGINT, handle)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _resumed(state: Path, settings: DemoSettings | None, given: frozenset[str] | None) -> DemoRun:
    run = DemoRun.resume(state, load_digits)
    if settings is not None:
        asked, kept = settings.to_dict(), run.settings.to_dict()
        for name in sorted(asked if given is None else given):
            if asked[name] != kept[name]:
                raise ConfigError(
                    f"{name} is {asked[name]!r}, and the run to resume in {str(state.parent)!r} has {kept[name]!r}; "
                    "leave the option out to resume, or start a new run in another folder with --output"
                )
    return run


def _set_aside_unfinished(state: Path, out: TextIO) -> None:
    """Keep the state of an unfinished run that a new one in the same folder would overwrite."""
    if not state.exists():
        return
    with contextlib.suppress(StateError):
        found = read_state(state)
        evaluated = state.with_name(NUMBERS).exists()
        if 0 < found["step"] < found["settings"]["steps"] or (found["step"] and not evaluated):
            aside = _unused(state)
            os.replace(state, aside)
            print(
                f"The run that stopped here after step {found['step']} of {found['settings']['steps']} is kept as "
                f"{aside}; --resume would have gone on with it.",
                file=out,
            )


def _unused(state: Path) -> Path:
    """Return a name beside `state` that no earlier run was set aside under."""
    return next(
        path
        for number in itertools.count(1)
        if not (path := state.with_name(f"{state.stem}-before-{number}{state.suffix}")).exists()
    )


def _introduction(run: DemoRun) -> str:
    names = ", ".join(run.ast.sub_nets)
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    return (
        f"One run of {run.settings.steps} steps for the sub-nets {names} of one network\n"
        f"with {parameters:,} parameters, {run.ast.masks.total():,} of them prunable.\n"
        f"Data: {TRAIN_IMAGES} handwritten digits to train, {TEST_IMAGES} in {TEST_VIEWS} augmented views to test."
    )


def _write_results(run: DemoRun, output: Path, out: TextIO) -> DemoResult:
    report = Report.from_training(
        run.ast,
        title="Sparse sub-nets for handwritten digits",
        example_inputs=run.digits.test_images[:1],
        elapsed_seconds=run.elapsed_seconds,
    )
    elastic, numbers = output / ELASTIC, output / NUMBERS
    run.ast.save(elastic, report=report.to_dict())
    report.write_json(numbers)
    page: Path | None = output / PAGE
    try:
        report.write_html(output / PAGE)
    except MissingExtraError as error:
        page = None
        print(f"No page: {error}", file=out)
    return DemoResult(report=report, elastic=elastic, page=page, numbers=numbers, run=run)


def _summary(result: DemoResult) -> str:
    lines = ["", result.report.render_terminal(), ""]
    size = result.elastic.stat().st_size
    lines.append(f"Elastic file  {result.elastic} ({size / 1000:,.0f} kB, all sub-nets)")
    if result.page is not None:
        lines.append(f"Report        {result.page}")
    lines.append(f"Numbers       {result.numbers}")
    sub_nets = result.run.ast.sub_nets
    sparsest = max(sub_nets, key=result.run.ast.masks.sparsity)
    middle = sub_nets[len(sub_nets) // 2]
    width = result.run.settings.width
    network = "DigitsResNet()" if width == DemoSettings().width else f"DigitsResNet({width})"
    code = (
        "import ast_plugin; from ast_plugin.demo_model import DigitsResNet; "
        f"elastic = ast_plugin.load({_quoted(str(result.elastic))}, {network}); "
        f"elastic.switch({_quoted(sparsest)}); print(elastic.active)"
    )
    target = result.elastic.with_name(f"{middle.replace(':', '-')}.safetensors")
    command = ["export", str(result.elastic), "--sub-net", middle, "--to", str(target)]
    lines += [
        "",
        f"Switch:  {python_command()} -c {shlex.quote(code)}",
        f"Export:  {program_command()} {shlex.join(command)}",
    ]
    return "\n".join(lines)


def _how_to_go_on(step: int, steps: int, state: Path) -> str:
    output = "" if state.parent == DEFAULT_OUTPUT else f" --output {shlex.quote(str(state.parent))}"
    return (
        f"Interrupted. Last state: {state} (after step {step} of {steps}).\n"
        f"Go on with:  {program_command()} demo --resume{output}"
    )


def program_command() -> str:
    """Return what to type for this program: its bare name where the shell finds it, else the path it was called by."""
    called = Path(sys.argv[0])
    if called.name != "ast-plugin":
        return f"{python_command()} -m ast_plugin"
    found = shutil.which(called.name)
    if found is not None and Path(found).resolve() == called.resolve():
        return called.name
    return shlex.quote(_shorter(called))


def python_command() -> str:
    """Return what to type for this interpreter: ``python`` where the shell finds it by that name, else its path."""
    found = shutil.which("python")
    # Not resolved: the python of a virtual environment is a link, and what it points to knows no packages.
    if found is not None and os.path.abspath(found) == os.path.abspath(sys.executable):
        return "python"
    return shlex.quote(_shorter(Path(sys.executable)))


def _quoted(text: str) -> str:
    """Return a Python string with double quotes, which a shell's single quotes can hold unchanged."""
    return json.dumps(text, ensure_ascii=False)


def _shorter(path: Path) -> str:
    """Return a path relative to the current folder if it lies below it, else in full."""
    absolute = Path(os.path.abspath(path))
    below = absolute.is_relative_to(Path.cwd())
    return str(absolute.relative_to(Path.cwd()) if below else absolute)
