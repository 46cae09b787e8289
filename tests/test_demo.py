"""The demo: what it prints and leaves behind, Ctrl-C and going on to the bit, what it says to bad input."""

from __future__ import annotations

import io
import json
import shlex
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from ast_plugin import cli, demo_progress
from ast_plugin.cli import main
from ast_plugin.demo import (
    CHECKPOINT,
    DemoInterrupted,
    program_command,
    python_command,
    run_demo,
    stop_on_interrupt,
)
from ast_plugin.demo_data import Digits, load_digits
from ast_plugin.demo_model import DigitsResNet
from ast_plugin.demo_progress import LiveProgress, Progress, progress, seconds_left
from ast_plugin.demo_run import METRIC, DemoRun, accuracy, read_state
from ast_plugin.demo_settings import DemoSettings
from ast_plugin.elastic import load
from ast_plugin.elastic_file import read_elastic
from ast_plugin.errors import ConfigError, MissingExtraError, SaveError, StateError

SMALL = DemoSettings(sparsities=(0.5, 0.8), steps=24, width=4, batch_size=16, update_interval=6)


@pytest.fixture(scope="module")
def digits() -> Digits:
    return load_digits()


def steps(run: DemoRun, count: int) -> list[float]:
    return [float(run.train_step().loss) for _ in range(count)]


def same(a: Any, b: Any) -> bool:
    """Compare nested containers of tensors and numbers to the bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


# ------------------------------------------------------------------ settings


def test_settings_survive_a_way_through_json() -> None:
    settings = DemoSettings(sparsities=(0.5, "2:4"), update_interval=7)
    assert DemoSettings.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings


def test_an_unknown_setting_offers_the_near_names() -> None:
    with pytest.raises(StateError, match="unknown setting 'step' of a demo run: did you mean 'steps'"):
        DemoSettings.from_dict({"step": 3})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("steps", 0, "steps must be a positive whole number, got 0"),
        ("batch_size", 2.5, "batch_size must be a positive whole number, got 2.5"),
        ("threads", True, "threads must be a positive whole number, got True"),
        ("batch_size", 1001, "batch_size must be at most 1000, got 1001, which is more than the images there are to"),
        ("width", 10**9, "width must be at most 512, got 1000000000"),
        ("threads", 10**6, "threads must be at most 1024, got 1000000"),
        ("learning_rate", float("nan"), "learning_rate must be a number above 0, got nan"),
        ("weight_decay", -1, "weight_decay must be a number of at least 0, got -1"),
        ("sparsities", (), "sparsities is empty"),
    ],
)
def test_settings_outside_their_range_are_refused(name: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DemoSettings(**{name: value})


def test_the_learning_rate_falls_from_its_start_to_zero() -> None:
    # Half a cosine over 4 steps: cos(0) = 1, cos(pi/4) = .7071, cos(pi/2) = 0, cos(3pi/4) = -.7071.
    settings = DemoSettings(steps=4, learning_rate=0.2, end_step=1, update_interval=1, sparsities=(0.5,))
    rates = [settings.learning_rate_at(step) for step in range(5)]
    assert rates == pytest.approx([0.2, 0.17071, 0.1, 0.02929, 0.0], abs=1e-5)


# ------------------------------------------------------------------ progress


def test_plain_progress_prints_ten_lines_that_name_the_active_sub_net() -> None:
    out = io.StringIO()
    with progress(out, steps=40, done=0, targets={"s50": 0.5, "s80": 0.8}) as display:
        assert type(display) is Progress
        for step in range(1, 41):
            display.update(step, sub_net="s80", loss=torch.tensor(0.25), sparsities={"s50": 0.5, "s80": step / 50})
    lines = out.getvalue().splitlines()
    assert len(lines) == 10
    assert lines[0].startswith("step  4/40  loss 0.250  zeros: s50 50.0 %  >s80 8.0 %")
    assert lines[-1].startswith("step 40/40  loss 0.250  zeros: s50 50.0 %  >s80 80.0 %")


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


@pytest.mark.extra("report")
def test_live_progress_marks_the_active_sub_net(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_progress, "_REFRESH_SECONDS", 0)
    monkeypatch.setenv("TERM", "xterm")
    out = Terminal()
    with progress(out, steps=4, done=1, targets={"s50": 0.5, "s80": 0.8}) as display:
        assert isinstance(display, LiveProgress)
        display.update(2, sub_net="s80", loss=torch.tensor(0.25), sparsities={"s50": 0.25, "s80": 0.4})
    text = out.getvalue()
    assert "> s80" in text
    assert "> s50" not in text
    assert "2/4 steps  loss 0.250" in text
    assert "40.0 % of 80 % zeros" in text


@pytest.mark.extra("report")
def test_live_progress_ends_with_full_bars_and_no_active_sub_net(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    out = Terminal()
    with progress(out, steps=4, done=3, targets={"s0": 0.0, "s80": 0.8}) as display:
        # A whole number of weights need not make exactly 80 %.
        display.update(4, sub_net="s80", loss=torch.tensor(0.25), sparsities={"s0": 0.0, "s80": 0.7992})
    last = out.getvalue().split("4/4 steps")[-1]
    assert "79.9 % of 80 % zeros" in last
    assert "training now" not in last
    assert "\u257a" not in last  # the sign for the rest of a bar that is not full


def test_without_rich_a_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert type(progress(Terminal(), steps=4, done=0, targets={"s50": 0.5})) is Progress


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.2, ""), (42.4, "42 s left"), (59.6, "1 min 0 s left"), (125, "2 min 5 s left")]
)
def test_remaining_time_in_words(seconds: float, words: str) -> None:
    assert seconds_left(seconds) == words


# ------------------------------------------------------------------ one run


def test_accuracy_is_the_share_of_right_answers() -> None:
    # An identity layer answers with the index of the largest entry: 2, 0, 1; wanted 2, 0, 0: two of three.
    model = nn.Identity()
    scores = torch.tensor([[0.0, 0.1, 0.9], [0.8, 0.1, 0.1], [0.2, 0.7, 0.1]])
    assert accuracy(model, scores, torch.tensor([2, 0, 0])) == pytest.approx(2 / 3)


@pytest.mark.extra("demo")
def test_the_sub_nets_are_trained_in_turn_and_reach_their_sparsities(digits: Digits) -> None:
    run = DemoRun(SMALL, digits)
    trained = [run.train_step().sub_net for _ in range(24)]
    assert trained == ["s50", "s80"] * 12
    assert run.finished
    total = run.ast.masks.total()
    for name, sparsity in (("s50", 0.5), ("s80", 0.8)):
        assert abs(run.ast.masks.kept(name) - (1 - sparsity) * total) <= 1


@pytest.mark.extra("demo")
def test_building_a_run_leaves_torchs_random_state_alone(digits: Digits) -> None:
    before = torch.get_rng_state()
    DemoRun(SMALL, digits)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.extra("demo")
def test_evaluation_measures_every_sub_net_and_changes_nothing(digits: Digits) -> None:
    run = DemoRun(SMALL, digits)
    steps(run, 4)
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    accuracies = run.evaluate()
    assert set(accuracies) == {"s50", "s80"}
    assert all(0 <= value <= 100 for value in accuracies.values())
    assert run.ast.metrics == {name: {METRIC: value} for name, value in accuracies.items()}
    assert same(run.model.state_dict(), before)
    assert run.model.training


@pytest.mark.extra("demo")
@pytest.mark.parametrize("stop", [1, 11, 23])
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(stop: int, digits: Digits, tmp_path: Path) -> None:
    whole = DemoRun(SMALL, digits)
    losses = steps(whole, 24)
    first = DemoRun(SMALL, digits)
    before = steps(first, stop)
    first.save(tmp_path / "state.pt")
    second = DemoRun.resume(tmp_path / "state.pt", lambda: digits)
    assert second.step == stop
    assert before + steps(second, 24 - stop) == losses
    assert same(second.model.state_dict(), whole.model.state_dict())
    assert same(second.optimizer.state_dict(), whole.optimizer.state_dict())


# ------------------------------------------------------------------ bad states


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "nothing to resume: .* does not exist; start without --resume"),
        (b"not a state", "cannot be read"),
        ({"format": "another program's"}, "is no state of a demo run"),
        ({"format": "ast-plugin demo", "version": 99}, "has version 99, and this version of the package reads 1"),
    ],
)
def test_a_state_that_cannot_be_used_is_refused_with_the_reason(content: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / CHECKPOINT
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(StateError, match=message):
        read_state(path)


@pytest.mark.extra("demo")
def test_a_truncated_state_is_refused(digits: Digits, tmp_path: Path) -> None:
    path = tmp_path / CHECKPOINT
    DemoRun(SMALL, digits).save(path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(StateError, match=r"cannot be read: .*; start anew without --resume"):
        DemoRun.resume(path, lambda: digits)


@pytest.mark.extra("demo")
def test_a_state_without_its_parts_is_refused(digits: Digits, tmp_path: Path) -> None:
    path = tmp_path / CHECKPOINT
    DemoRun(SMALL, digits).save(path)
    state = torch.load(path, weights_only=True)
    del state["optimizer"]
    torch.save(state, path)
    with pytest.raises(StateError, match="does not fit this version of the demo: 'optimizer'"):
        DemoRun.resume(path, lambda: digits)


@pytest.mark.extra("demo")
def test_options_that_contradict_the_run_to_resume_are_refused(digits: Digits, tmp_path: Path) -> None:
    DemoRun(SMALL, digits).save(tmp_path / CHECKPOINT)
    with pytest.raises(ConfigError, match=r"seed is 5, and the run to resume in .* has 0; leave the option out"):
        run_demo(DemoSettings(seed=5), output=tmp_path, resume=True, given=frozenset({"seed"}), out=io.StringIO())


@pytest.mark.extra("demo")
def test_an_unknown_method_offers_the_near_names_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", "--method", "granite", "--output", str(tmp_path / "run")]) == cli.USAGE
    assert "did you mean 'granet'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.extra("demo")
def test_a_folder_that_cannot_be_made_is_noticed_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    out = io.StringIO()
    with pytest.raises(SaveError, match="a part of the path is a file"):
        run_demo(SMALL, output=tmp_path / "file" / "run", out=out)
    assert "step" not in out.getvalue()


# ------------------------------------------------------------------ the whole job


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Folder and output of a finished run."""
    folder = tmp_path_factory.mktemp("demo") / "run"
    out = io.StringIO()
    run_demo(SMALL, output=folder, out=out)
    return folder, out.getvalue()


@pytest.mark.extra("demo")
def test_a_run_leaves_file_page_and_numbers(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    assert sorted(path.name for path in folder.iterdir()) == [
        "checkpoint.pt",
        "elastic.safetensors",
        "report.html",
        "report.json",
    ]
    numbers = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert [net["name"] for net in numbers["sub_nets"]] == ["s50", "s80"]
    assert read_elastic(folder / "elastic.safetensors").header["report"] == numbers


@pytest.mark.extra("demo")
def test_the_table_shows_what_was_asked_for(finished: tuple[Path, str]) -> None:
    _, text = finished
    for word in ("sub-net", "sparsity", "parameters", "FLOPs", METRIC.split()[0], "conflicts", "s50", "80.0"):
        assert word in text


@pytest.mark.extra("demo")
def test_the_file_gives_the_accuracies_of_the_table(finished: tuple[Path, str], digits: Digits) -> None:
    folder, _ = finished
    model = DigitsResNet(4)
    elastic = load(folder / "elastic.safetensors", model)
    model.eval()
    for name in elastic.sub_nets:
        elastic.switch(name)
        measured = 100 * accuracy(model, digits.test_images, digits.test_labels)
        assert measured == pytest.approx(elastic.metrics[name][METRIC])


@pytest.mark.extra("demo")
@pytest.mark.slow
def test_the_lines_for_switching_and_exporting_run_as_they_are(finished: tuple[Path, str], tmp_path: Path) -> None:
    folder, text = finished
    lines = dict(line.split(":  ", 1) for line in text.splitlines() if line.startswith(("Switch:", "Export:")))
    switched = subprocess.run(lines["Switch"], shell=True, capture_output=True, text=True, check=True)
    assert switched.stdout == "s80\n"
    # The line names this interpreter or the installed script; both are the same command.
    arguments = shlex.split(lines["Export"])
    assert main(arguments[arguments.index("export") :]) == cli.OK
    state = load_file(folder / "s80.safetensors")
    DigitsResNet(4).load_state_dict(state)


@pytest.mark.extra("demo")
def test_resuming_a_finished_run_evaluates_again(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    before = (folder / "report.json").read_text(encoding="utf-8")
    out = io.StringIO()
    run_demo(output=folder, resume=True, out=out)
    assert "Going on after step 24 of 24" in out.getvalue()
    assert (folder / "report.json").read_text(encoding="utf-8") == before


@pytest.mark.extra("demo")
def test_a_new_run_keeps_the_state_of_an_unfinished_one(digits: Digits, tmp_path: Path) -> None:
    run = DemoRun(SMALL, digits)
    steps(run, 5)
    run.save(tmp_path / CHECKPOINT)
    out = io.StringIO()
    run_demo(SMALL, output=tmp_path, out=out)
    kept = tmp_path / "checkpoint-before-1.pt"
    assert f"The run that stopped here after step 5 of 24 is kept as {kept}" in out.getvalue()
    assert read_state(kept)["step"] == 5
    assert read_state(tmp_path / CHECKPOINT)["step"] == 24
    # A second unfinished run does not push the first one out, and one that was never evaluated counts as unfinished.
    steps(run, 19)
    run.save(tmp_path / CHECKPOINT)
    (tmp_path / "report.json").unlink()
    run_demo(SMALL, output=tmp_path, out=out)
    assert read_state(kept)["step"] == 5
    assert read_state(tmp_path / "checkpoint-before-2.pt")["step"] == 24


@pytest.mark.extra("demo")
@pytest.mark.parametrize("content", [b"no checkpoint", b"PK\x03\x04 cut off"])
def test_a_foreign_state_is_refused_without_the_advice_to_execute_it(tmp_path: Path, content: bytes) -> None:
    (tmp_path / CHECKPOINT).write_bytes(content)
    with pytest.raises(
        StateError, match="is damaged, or no state of a demo run; start anew without --resume"
    ) as caught:
        read_state(tmp_path / CHECKPOINT)
    assert "weights_only" not in str(caught.value)


def test_plain_lines_show_the_sub_nets_in_turn() -> None:
    out = io.StringIO()
    with progress(out, steps=1800, done=0, targets={"a": 0.9, "b": 0.95, "c": 0.98}) as display:
        for step in range(1, 1801):
            display.update(
                step, sub_net="abc"[(step - 1) % 3], loss=torch.tensor(1.0), sparsities=dict.fromkeys("abc", 0.5)
            )
    lines = out.getvalue().splitlines()
    assert len(lines) == 10
    assert {line.split(">")[1][0] for line in lines} == {"a", "b", "c"}


@pytest.mark.extra("demo")
def test_without_matplotlib_only_the_page_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> None:
        raise MissingExtraError("the page needs matplotlib")

    monkeypatch.setattr("ast_plugin.report.Report.write_html", missing)
    out = io.StringIO()
    result = run_demo(SMALL, output=tmp_path, out=out)
    assert result.page is None
    assert result.numbers.exists()
    assert "No page: the page needs matplotlib" in out.getvalue()


@pytest.mark.extra("demo")
def test_the_number_of_threads_is_put_back(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        run_demo(SMALL, output=tmp_path, out=io.StringIO())
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed ``ast-plugin`` in a folder below the current one, which called this process."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "my venv" / "bin" / "ast-plugin"
    path.parent.mkdir(parents=True)
    path.touch(mode=0o755)
    monkeypatch.setattr(sys, "argv", [str(path), "demo"])
    return path


def test_commands_are_named_in_full_where_the_shell_does_not_find_them(
    script: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(sys, "executable", str(script.with_name("python")))
    assert program_command() == "'my venv/bin/ast-plugin'"
    assert python_command() == "'my venv/bin/python'"


def test_commands_are_named_shortly_where_the_shell_finds_them(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script.with_name("python").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(script.parent))
    monkeypatch.setattr(sys, "executable", str(script.with_name("python")))
    assert program_command() == "ast-plugin"
    assert python_command() == "python"


def test_a_run_by_python_m_is_gone_on_with_in_the_same_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/ast_plugin/__main__.py", "demo"])
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(sys, "executable", "/opt/python")
    assert program_command() == "/opt/python -m ast_plugin"


# ------------------------------------------------------------------ Ctrl-C


def test_the_first_ctrl_c_asks_to_stop_and_the_second_interrupts() -> None:
    before = signal.getsignal(signal.SIGINT)
    with stop_on_interrupt() as stop:
        assert not stop.is_set()
        signal.raise_signal(signal.SIGINT)
        assert stop.is_set()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_outside_the_main_thread_the_handler_stays_as_it_is() -> None:
    before = signal.getsignal(signal.SIGINT)
    seen = []

    def work() -> None:
        with stop_on_interrupt() as stop:
            seen.append((stop.is_set(), signal.getsignal(signal.SIGINT) is before))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(False, True)]


class Interrupting(io.StringIO):
    """Presses Ctrl-C when a line begins as asked."""

    def __init__(self, line: str, times: int = 1) -> None:
        super().__init__()
        self._line = line
        self._times = times

    def write(self, text: str) -> int:
        if text.startswith(self._line):
            for _ in range(self._times):
                signal.raise_signal(signal.SIGINT)
        return super().write(text)


@pytest.mark.extra("demo")
def test_ctrl_c_in_training_saves_the_step_in_progress_and_says_how_to_go_on(tmp_path: Path) -> None:
    with pytest.raises(DemoInterrupted) as caught:
        run_demo(SMALL, output=tmp_path, out=Interrupting("step 12/24"))
    assert f"Last state: {tmp_path / CHECKPOINT} (after step 12 of 24)" in str(caught.value)
    assert f"demo --resume --output {tmp_path}" in str(caught.value)
    assert read_state(tmp_path / CHECKPOINT)["step"] == 12


@pytest.mark.extra("demo")
def test_a_second_ctrl_c_falls_back_on_the_last_state_on_disk(tmp_path: Path) -> None:
    with pytest.raises(DemoInterrupted, match="after step 10 of 24"):
        run_demo(SMALL, output=tmp_path, out=Interrupting("step 12/24", times=2), checkpoint_every=10)
    assert read_state(tmp_path / CHECKPOINT)["step"] == 10


@pytest.mark.extra("demo")
def test_ctrl_c_in_evaluation_loses_no_training(tmp_path: Path) -> None:
    with pytest.raises(DemoInterrupted, match="after step 24 of 24"):
        run_demo(SMALL, output=tmp_path, out=Interrupting("Evaluating"))
    assert read_state(tmp_path / CHECKPOINT)["step"] == 24


@pytest.mark.extra("demo")
@pytest.mark.slow
def test_ctrl_c_in_a_process_then_resume_equals_the_uninterrupted_run(
    finished: tuple[Path, str], tmp_path: Path
) -> None:
    command = [sys.executable, "-u", "-m", "ast_plugin", "demo", "--output", str(tmp_path)]
    options = ["--sparsities", "0.5", "0.8", "--steps", "24", "--width", "4", "--batch-size", "16"]
    process = subprocess.Popen(
        [*command, *options, "--update-interval", "6"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step "):
            process.send_signal(signal.SIGINT)
            break
    _, complaint = process.communicate(timeout=120)
    assert process.returncode == cli.INTERRUPTED, complaint
    assert complaint.startswith("ast-plugin: Interrupted. Last state: ")
    assert "Traceback" not in complaint
    assert 0 < read_state(tmp_path / CHECKPOINT)["step"] < 24
    assert main(["demo", "--resume", "--output", str(tmp_path)]) == cli.OK
    whole, resumed = read_state(finished[0] / CHECKPOINT), read_state(tmp_path / CHECKPOINT)
    del whole["elapsed_seconds"], resumed["elapsed_seconds"]
    assert same(whole, resumed)
    assert same(load_file(finished[0] / "elastic.safetensors"), load_file(tmp_path / "elastic.safetensors"))
