"""Ensembles of sub-nets: averages and disagreement by hand, forms of output, evaluation, and a model left as it was."""

from __future__ import annotations

import contextlib
import copy
import importlib.metadata
import json
import math
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from elastic_examples import images, network, write_example
from networks import image_batch, mlp, snapshot, train, vector_batch, wrapped
from sliced_examples import HYBRID_GROUPS, hybrid, pictures, write_channels
from torch import Tensor, nn
from torch.nn import functional

from ast_plugin.elastic import Elastic, load
from ast_plugin.errors import ConfigError
from ast_plugin.integrations.family import Ensemble, ensemble
from ast_plugin.integrations.family.ensemble_measures import (
    Calibration,
    auroc,
    dissent,
    entropy,
    log_mean,
    mutual_information,
)
from ast_plugin.versions import Version

LN2 = math.log(2)


class Table(nn.Module):
    """Returns what stands in a table for the sub-net that is on, whatever the inputs are."""

    def __init__(self, outputs: Mapping[str, Any]) -> None:
        super().__init__()
        self.outputs = dict(outputs)
        self.on = "none"
        self.called: list[tuple[str, bool, bool]] = []

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.called.append((self.on, self.training, torch.is_grad_enabled()))
        return self.outputs[self.on]


class Source:
    """Sub-nets by name over a `Table`."""

    def __init__(self, **outputs: Any) -> None:
        self.model = Table(outputs)
        self.sub_nets = tuple(outputs)

    @contextlib.contextmanager
    def sub_net(self, name: str) -> Iterator[nn.Module]:
        before, self.model.on = self.model.on, name
        try:
            yield self.model
        finally:
            self.model.on = before


def logits(*rows: list[float]) -> Tensor:
    """Return logits whose softmax are the given probabilities, up to a constant a row."""
    return torch.tensor(rows).log() + torch.arange(len(rows))[:, None]


@pytest.fixture
def elastic(tmp_path: Path) -> Elastic:
    return load(write_example(tmp_path / "elastic.safetensors"), network(seed=5))


# Measures, worked by hand


def test_probabilities_are_averaged_and_not_logits() -> None:
    # (.9, .1) and (.5, .5) -> (.7, .3); averaged logits would give (3 : 1) = (.75, .25).
    mean = log_mean(torch.tensor([[0.9, 0.1], [0.5, 0.5]]).log())
    assert mean.exp().tolist() == pytest.approx([0.7, 0.3])
    tiny = torch.tensor([[-200.0, 0.0], [-210.0, 0.0]])  # whose probabilities are no numbers of float32
    assert log_mean(tiny)[0].item() == pytest.approx(-200 + math.log((1 + math.exp(-10)) / 2))


def test_mutual_information_by_hand() -> None:
    # Two members, (.9, .1) and (.1, .9): the mean's entropy is ln 2 = .693, each one's own -.9 ln .9 - .1 ln .1 = .325.
    found = mutual_information(torch.tensor([[[0.9, 0.1], [0.8, 0.2]], [[0.1, 0.9], [0.8, 0.2]]]).log())
    assert found.tolist() == pytest.approx([LN2 - 0.325083, 0.0], abs=1e-5)
    assert entropy(torch.tensor([0.9, 0.1]).log()).item() == pytest.approx(0.325083)
    sure = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]).log()
    assert mutual_information(sure).item() == pytest.approx(math.log(3))  # the most that three members can


def test_dissent_by_hand() -> None:
    # Three members, four inputs: all for 1; two of three for 0; three answers; one against two.
    answers = torch.tensor([[1, 0, 0, 2], [1, 0, 1, 1], [1, 2, 2, 2]])
    assert dissent(answers).tolist() == pytest.approx([0, 1 / 3, 2 / 3, 1 / 3])


def test_calibration_error_by_hand() -> None:
    # Bins are (k/15, (k+1)/15]. .95, .97 lie in the last: mean .96, half are right: difference .46. .5 lies in (7/15,
    # 8/15], right: .5. .05 lies in the first, wrong: .05. Weighted: (2 * .46 + .5 + .05) / 4.
    calibration = Calibration()
    calibration.add(torch.tensor([0.95, 0.5]), torch.tensor([True, True]))
    calibration.add(torch.tensor([0.97, 0.05]), torch.tensor([False, False]))
    assert calibration.error() == pytest.approx((2 * 0.46 + 0.5 + 0.05) / 4)
    ends = Calibration()
    ends.add(torch.tensor([0.0, 1.0]), torch.tensor([False, True]))
    assert ends.error() == 0


def test_area_under_the_curve_by_hand() -> None:
    # Positives 3 and 1, negatives 1 and 0: 3 beats both, 1 ties one (1/2) and beats the other: (2 + 1.5) / 4.
    scores = torch.tensor([3.0, 1.0, 1.0, 0.0])
    assert auroc(scores, torch.tensor([True, True, False, False])) == pytest.approx(3.5 / 4)
    assert auroc(scores, torch.tensor([False, False, True, True])) == pytest.approx(0.5 / 4)
    assert auroc(scores, torch.ones(4, dtype=torch.bool)) is None
    assert auroc(scores, torch.zeros(4, dtype=torch.bool)) is None


# Predictions


def test_prediction_by_hand() -> None:
    source = Source(
        a=logits([0.9, 0.1], [0.2, 0.8]), b=logits([0.5, 0.5], [0.2, 0.8]), c=logits([0.1, 0.9], [0.2, 0.8])
    )
    found = ensemble(source, ["a", "c"]).predict(torch.zeros(2, 1))
    assert found.members == ("a", "c")
    assert found.mean.flatten().tolist() == pytest.approx([0.5, 0.5, 0.2, 0.8])
    assert found.predictions[1].flatten().tolist() == pytest.approx([0.1, 0.9, 0.2, 0.8])
    assert found.disagreement.tolist() == pytest.approx([LN2 - 0.325083, 0.0], abs=1e-5)
    assert found.dissent is not None
    assert found.dissent.tolist() == [0.5, 0.0]
    assert ensemble(source).predict(0).predictions.shape == (3, 2, 2)


def test_the_answer_stands_where_the_models_stood() -> None:
    source = Source(a=logits([0.9, 0.1]), b=logits([0.5, 0.5]))
    answer = ensemble(source)(torch.zeros(1, 1))
    assert answer.softmax(-1).flatten().tolist() == pytest.approx([0.7, 0.3])
    # So any loss of logits is that of the averaged probabilities.
    assert functional.cross_entropy(answer, torch.tensor([1])).item() == pytest.approx(-math.log(0.3))


def test_regression_by_hand() -> None:
    source = Source(a=torch.tensor([[1.0], [3.0]]), b=torch.tensor([[3.0], [3.0]]))
    both = ensemble(source, task="regression")
    assert both(0).tolist() == [[2.0], [3.0]]
    found = both.predict(0)
    assert found.disagreement.tolist() == [[1.0], [0.0]]  # sqrt(((1 - 2)^2 + (3 - 2)^2) / 2)
    assert found.dissent is None
    report = both.evaluate([(torch.zeros(2), torch.tensor([2.0, 1.0]))])
    # Squares of a: 1, 4; of b: 1, 4; of the average: 0, 4.
    assert [record.rmse for record in report.records] == pytest.approx([math.sqrt(2.5), math.sqrt(2.5), math.sqrt(2)])
    assert report.ensemble.accuracy is None
    assert report.disagreement == pytest.approx(0.5)
    assert "RMSE" in str(report)


def test_classes_may_lie_in_another_dimension() -> None:
    maps = torch.randn(2, 3, 4, 5)
    pixels = ensemble(Source(a=maps, b=2 * maps), class_dim=1)
    found = pixels.predict(0)
    expected = (maps.softmax(1) + (2 * maps).softmax(1)) / 2
    assert torch.allclose(found.mean, expected)
    assert found.predictions.shape == (2, 2, 3, 4, 5)
    assert found.disagreement.shape == (2, 4, 5)
    assert torch.allclose(pixels(0).exp(), expected)
    report = pixels.evaluate([(torch.zeros(2), expected.argmax(1))])
    assert (report.predictions, report.ensemble.accuracy) == (40, 1.0)


@pytest.mark.parametrize(
    ("output", "kind"),
    [
        ({"logits": torch.randn(2, 3), "hidden": torch.zeros(1)}, dict),
        (SimpleNamespace(logits=torch.randn(2, 3), hidden=1), SimpleNamespace),
        ((torch.randn(2, 3),), tuple),
        ([torch.randn(2, 3)], tuple),
    ],
)
def test_forms_of_output(output: Any, kind: type) -> None:
    answer = ensemble(Source(a=output, b=output))(0)
    assert type(answer) is kind
    tensor = answer[0] if kind is tuple else answer["logits"] if kind is dict else answer.logits
    assert tensor.shape == (2, 3)
    if kind is dict:
        assert list(answer) == ["logits"]


def test_what_is_averaged_can_be_picked() -> None:
    output = (torch.tensor(0.5), torch.randn(2, 3))
    with pytest.raises(ConfigError, match=r"a tuple of 2, which cannot be averaged; give pick="):
        ensemble(Source(a=output))(0)
    assert ensemble(Source(a=output), pick=lambda output: output[1])(0).shape == (2, 3)


def test_half_precision_is_averaged_in_float32_and_answered_in_half() -> None:
    both = ensemble(Source(a=logits([0.9, 0.1]).bfloat16(), b=logits([0.5, 0.5]).bfloat16()))
    assert both.predict(0).mean.dtype == torch.float32
    assert both(0).dtype == torch.bfloat16
    double = ensemble(Source(a=logits([0.9, 0.1]).double()))
    assert double.predict(0).mean.dtype == torch.float64


@pytest.mark.parametrize("how", ["tensor", "positional", "keywords"])
def test_it_is_called_like_the_model(how: str) -> None:
    class Two(nn.Module):
        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            return torch.stack([left, right], 1)

    source = Source(a=None)
    source.model = Two() if how != "tensor" else nn.Identity()
    source.model.on = "a"
    left, right = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])
    labels = torch.tensor([1, 1])
    both = ensemble(source)
    if how == "tensor":
        answer, batch = both(torch.stack([left, right], 1)), (torch.stack([left, right], 1), labels)
    elif how == "positional":
        answer, batch = both(left, right), ((left, right), labels)
    else:
        answer, batch = both(left=left, right=right), {"left": left, "right": right, "labels": labels}
    assert torch.allclose(answer.exp(), torch.stack([left, right], 1).softmax(1))
    assert both.evaluate([batch]).ensemble.accuracy == 1.0


# Real sub-nets


def test_it_averages_what_each_sub_net_says(elastic: Elastic) -> None:
    elastic.switch("s80")
    own = {}
    for name in elastic.sub_nets:
        with elastic.sub_net(name), torch.no_grad():
            own[name] = elastic.model(images()).softmax(-1)
    found = ensemble(elastic).predict(images())
    assert torch.allclose(found.mean, (own["s50"] + own["s80"]) / 2)
    assert torch.allclose(found.predictions, torch.stack([own["s50"], own["s80"]]))
    assert elastic.active == "s80"


def test_it_leaves_everything_as_it_was(elastic: Elastic) -> None:
    elastic.switch("s80")
    elastic.model.train()
    elastic.model.norm.eval()
    before = snapshot(elastic.model)
    answer = ensemble(elastic)(images())
    assert elastic.active == "s80"
    assert [module.training for module in elastic.model.modules()] == [True, True, False, True, True]
    assert all(torch.equal(tensor, before[name]) for name, tensor in snapshot(elastic.model).items())
    assert not answer.requires_grad


def test_after_an_exception_too(elastic: Elastic) -> None:
    both = ensemble(elastic)
    elastic.switch("s80")
    elastic.model.train()
    with pytest.raises(RuntimeError):
        both(torch.zeros(1, 7, 6, 6))
    assert elastic.active == "s80"
    assert elastic.model.training


def test_members_run_in_eval_mode_without_gradients() -> None:
    source = Source(a=logits([0.5, 0.5]), b=logits([0.4, 0.6]))
    source.model.train()
    both = ensemble(source)
    both(0)
    assert source.model.called == [("a", False, False), ("b", False, False)]
    assert both.train() is both
    assert both.eval().train(True).training is False


def test_of_a_run_in_training() -> None:
    model, optimizer, ast = wrapped()
    train(model, optimizer, range(9))
    inputs = image_batch(0)[0]
    both = ensemble(ast, ["s50", "s90"])
    model.eval()
    with torch.no_grad():
        with ast.sub_net("s50"):
            dense = model(inputs).softmax(-1)
        with ast.sub_net("s90"):
            sparse = model(inputs).softmax(-1)
    model.train()
    before = snapshot(model)
    assert torch.allclose(both.predict(inputs).mean, (dense + sparse) / 2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in snapshot(model).items())
    report = both.evaluate([image_batch(0)])
    assert report.ensemble.kept_weights == ast.masks.kept("s50") + ast.masks.kept("s90")
    train(model, optimizer, range(9, 12))
    assert ast.step == 12


def test_of_a_version_of_a_run() -> None:
    model, optimizer, ast = wrapped(mlp(), update_interval=3)
    train(model, optimizer, range(3), vector_batch)
    weights = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    ast.add_version("nothing", lambda: Version(weights=weights, masks={}, private={}))
    both, inputs = ensemble(ast), vector_batch(0)[0]
    of_the_run = both(inputs)
    with ast.version("nothing"):
        assert both.predict(inputs).mean.allclose(torch.full((16, 4), 0.25))
    assert torch.equal(both(inputs), of_the_run)


def test_of_a_twin() -> None:
    model, optimizer, ast = wrapped()
    train(model, optimizer, range(3))
    report = ensemble(ast.twin(copy.deepcopy(model))).evaluate([image_batch(0)])
    assert len(report.members) == 3
    assert report.ensemble.kept_weights is None  # a twin tells no counts
    assert "weights kept" not in str(report)


def test_of_channel_sub_nets(tmp_path: Path) -> None:
    elastic = load(write_channels(tmp_path / "channels.safetensors", hybrid(), HYBRID_GROUPS), hybrid(seed=3))
    own = []
    for name in elastic.sub_nets:
        with elastic.sub_net(name), torch.no_grad():
            own.append(elastic.model(pictures()).softmax(-1))
    assert torch.allclose(ensemble(elastic).predict(pictures()).mean, torch.stack(own).mean(0))


def test_threads_take_turns(elastic: Elastic) -> None:
    both, one = ensemble(elastic), ensemble(elastic, ["s80"])
    expected = both(images()), one(images())
    wrong: list[str] = []

    def work(which: Ensemble, answer: Tensor) -> None:
        for _ in range(20):
            if not torch.equal(which(images()), answer):
                wrong.append(repr(which.names))

    threads = [threading.Thread(target=work, args=pair) for pair in zip((both, one) * 2, expected * 2, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert elastic.active == "s50"


def test_a_copy_is_independent(elastic: Elastic) -> None:
    both = ensemble(elastic)
    expected = both(images())
    other = copy.deepcopy(both)
    with torch.no_grad():
        both.model.head.bias.add_(1000.0 * torch.arange(5))
    assert torch.equal(other(images()), expected)
    assert not torch.equal(both(images()), expected)


def test_it_moves_with_the_model(elastic: Elastic) -> None:
    both = ensemble(elastic)
    expected = both(images())
    both.double()
    assert both.predict(images().double()).mean.dtype == torch.float64
    assert torch.allclose(both(images().double()).float(), expected, atol=1e-5)


# Evaluation


def labelled(*rows: list[float]) -> Tensor:
    return torch.tensor(rows).log()


def test_evaluation_by_hand() -> None:
    # Four inputs, labels 0, 0, 1, 1.
    a = labelled([0.90, 0.10], [0.58, 0.42], [0.70, 0.30], [0.20, 0.80])  # right, right, wrong, right
    b = labelled([0.72, 0.28], [0.18, 0.82], [0.06, 0.94], [0.18, 0.82])  # right, wrong, right, right
    # mean:       .81,  .19     .38,  .62     .38,  .62     .19,  .81       right, wrong, right, right
    report = ensemble(Source(a=a, b=b)).evaluate([(torch.zeros(4), torch.tensor([0, 0, 1, 1]))])
    assert [record.name for record in report.records] == ["a", "b", "ensemble"]
    assert [record.accuracy for record in report.records] == [0.75, 0.75, 0.75]
    nll = [-sum(map(math.log, values)) / 4 for values in ([0.9, 0.58, 0.3, 0.8], [0.72, 0.18, 0.94, 0.82])]
    nll.append(-sum(map(math.log, [0.81, 0.38, 0.62, 0.81])) / 4)
    assert [record.nll for record in report.records] == pytest.approx(nll)
    # ECE of the ensemble: .81 and .81 share a bin and are right: .19; .62 and .62 share one, half are right: .12.
    assert report.ensemble.ece == pytest.approx((2 * 0.19 + 2 * 0.12) / 4)
    assert [record.forward_passes for record in report.records] == [1, 1, 2]
    # Confidences: a is wrong at .70, right at .90, .58, .80: two of three are higher. b is wrong at .82, right at .72,
    # .82, .94: one is higher, one equal.
    assert [record.error_detection for record in report.members] == pytest.approx([2 / 3, 1.5 / 3])
    # Disagreement: inputs 2 and 3 have the members far apart; 2 is wrong. Below it: inputs 1 and 4, above: 3.
    assert report.error_detection == pytest.approx(2 / 3)
    assert report.disagreement_wrong is not None
    assert report.disagreement_right is not None
    assert report.disagreement == pytest.approx((report.disagreement_wrong + 3 * report.disagreement_right) / 4)


def test_batches_add_up(elastic: Elastic) -> None:
    batches = [(images()[:3], torch.tensor([0, 1, 2])), (images()[3:], torch.tensor([3]))]
    whole = ensemble(elastic).evaluate([(images(), torch.tensor([0, 1, 2, 3]))])
    parts = ensemble(elastic).evaluate(iter(batches))
    for one, other in zip(whole.records, parts.records, strict=True):
        assert (one.accuracy, one.kept_weights) == (other.accuracy, other.kept_weights)
        assert (one.nll, one.ece) == (pytest.approx(other.nll), pytest.approx(other.ece))
    assert whole.disagreement == pytest.approx(parts.disagreement)
    assert ensemble(elastic).evaluate(batches, max_batches=1).predictions == 3


def test_costs_are_measured(elastic: Elastic) -> None:
    ticks = iter(range(1000))
    report = ensemble(elastic).evaluate([(images(), torch.zeros(4, dtype=torch.long))], clock=lambda: next(ticks))
    # The untimed pass asks its own clock: a second for each member, and one for the average.
    assert [record.seconds for record in report.records] == [1, 1, 3]
    assert [record.kept_weights for record in report.records] == [
        *(elastic.records[name].kept for name in elastic.sub_nets),
        sum(elastic.records[name].kept for name in elastic.sub_nets),
    ]


def test_labels_that_do_not_count_are_left_out() -> None:
    tokens = labelled([0.9, 0.1], [0.4, 0.6], [0.7, 0.3], [0.2, 0.8]).view(2, 2, 2)
    source = Source(a={"logits": tokens})
    report = ensemble(source).evaluate([{"input": torch.zeros(1), "labels": torch.tensor([[0, -100], [1, 1]])}])
    assert (report.predictions, report.ensemble.accuracy) == (3, pytest.approx(2 / 3))
    with pytest.raises(ConfigError, match="no prediction was counted: every label is ignore_index=-100"):
        ensemble(source).evaluate([{"labels": torch.full((2, 2), -100)}])
    nobody = Source(a={"logits": tokens[:0]})
    with pytest.raises(ConfigError, match="no prediction was counted: there is none in the batches; give"):
        ensemble(nobody).evaluate([{"input": torch.zeros(1), "labels": torch.zeros(0, 2, dtype=torch.int64)}])


def test_the_report_is_a_table_and_plain_containers(elastic: Elastic, monkeypatch: pytest.MonkeyPatch) -> None:
    report = ensemble(elastic).evaluate([(images(), torch.tensor([0, 1, 2, 3]))])
    text = report.render(width=120, color=False)
    for word in ("An ensemble of 2", "4 predictions", "accuracy", "ECE", "NLL", "passes", "s50", "s80", "ensemble"):
        assert word in text
    assert "Disagreement (mutual information of member and class, nats): " in text
    values = json.loads(json.dumps(report.to_dict()))
    assert [record["name"] for record in values["records"]] == ["s50", "s80", "ensemble"]
    assert str(report)


def test_batches_of_other_forms_are_split_by_the_caller(elastic: Elastic) -> None:
    batch = (images(), "file.png", torch.tensor([0, 1, 2, 3]))
    with pytest.raises(ConfigError, match=r"a batch must be \(inputs, labels\).* got a tuple of 3; give split="):
        ensemble(elastic).evaluate([batch])
    assert ensemble(elastic).evaluate([batch], split=lambda batch: (batch[0], batch[2])).predictions == 4


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        ([], "loader gave no batch to evaluate"),
        ([{"images": 1}], "a batch of 'images' has no 'labels'"),
        ([(images(), [1, 2, 3, 4])], "labels must be a tensor, got a list"),
        ([(images(), torch.zeros(4))], r"integers of shape \(4,\) as the outputs have it, got torch.float32"),
        ([(images(), torch.zeros(4, 1, dtype=torch.long))], r"integers of shape \(4,\)"),
        ([(images(), torch.tensor([0, 1, 2, 5]))], r"labels must lie in \[0, 5\), .* got 0 to 5"),
        ([(images(), torch.tensor([0, 1, 2, -1]))], r"labels must lie in \[0, 5\), .* got -1 to 2"),
    ],
)
def test_data_that_cannot_be_evaluated(elastic: Elastic, loader: list[Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ensemble(elastic).evaluate(loader)
    assert elastic.active == "s50"


@pytest.mark.parametrize("max_batches", [0, -1, 1.5, True, "2"])
def test_a_number_of_batches_that_is_none_is_refused(elastic: Elastic, max_batches: Any) -> None:
    with pytest.raises(ConfigError, match="max_batches must be a number of batches, at least 1, or None for all"):
        ensemble(elastic).evaluate([(images(), torch.zeros(4))], max_batches=max_batches)


def test_members_that_have_diverged_are_named() -> None:
    sound, diverged = torch.zeros(2, 3), torch.tensor([[0.0, 1.0, 2.0], [0.0, 1.0, math.nan]])
    members = ensemble(Source(a=sound, b=diverged, c=sound))
    with pytest.raises(ConfigError, match="the predictions of 'b' are NaN for some inputs"):
        members.evaluate([(torch.zeros(2), torch.tensor([0, 1]))])
    assert members.evaluate([(torch.zeros(2), torch.tensor([0, -100]))]).predictions == 1  # where it does not count


def test_targets_of_a_regression_must_be_as_many() -> None:
    both = ensemble(Source(a=torch.zeros(4, 2)), task="regression")
    with pytest.raises(ConfigError, match=r"as many numbers as the model returns, of shape \(4, 2\), got shape \(4,\)"):
        both.evaluate([(0, torch.zeros(4))])


# What is refused


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "names must be a list of at least one name"),
        ("s50", "names must be a list of at least one name, got 's50'"),
        (["s50", "s08"], "there is no sub-net 's08': did you mean 's80'"),
        (["s50", "s50"], "names has 's50' twice"),
        ([0.5], "names must be a list"),
    ],
)
def test_names_that_make_no_ensemble(elastic: Elastic, names: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ensemble(elastic, names)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "clustering"}, "task must be one of classification, regression, got 'clustering'"),
        ({"pick": "logits"}, "pick must be a function"),
        ({"class_dim": "1"}, "class_dim must be an integer"),
        ({"class_dim": True}, "class_dim must be an integer"),
    ],
)
def test_options_out_of_range(elastic: Elastic, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ensemble(elastic, **options)


@pytest.mark.parametrize("source", [None, nn.Linear(2, 2), "elastic.safetensors"])
def test_what_has_no_sub_nets(source: Any) -> None:
    with pytest.raises(ConfigError, match=r"what ast_plugin.load\(\) or wrap\(\) returned, got a "):
        ensemble(source)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (None, "the network returns a NoneType, which cannot be averaged"),
        ({"boxes": torch.zeros(1), "scores": torch.zeros(1)}, "a dict of 'boxes', 'scores', which cannot be averaged"),
        ([torch.zeros(2, 2), torch.zeros(2, 2)], "a list of 2, which cannot be averaged"),
        (torch.zeros(2, 2, dtype=torch.long), "is of torch.int64, and averages are made of logits"),
        (torch.zeros(3), r"has shape \(3,\), and which dimension counts the classes is not clear"),
        (torch.zeros(1, 2, 3), r"has shape \(1, 2, 3\), and which dimension"),
        (torch.zeros(1, 2, 3, 4), "which dimension"),
        (torch.zeros(2, 1), "a single class is always right"),
    ],
)
def test_outputs_that_cannot_be_averaged(output: Any, message: str) -> None:
    source = Source(a=output)
    with pytest.raises(ConfigError, match=message):
        ensemble(source)(0)
    assert source.model.on == "none"


def test_a_class_dimension_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match=r"class_dim=2 is no dimension of the network's output, which has shape"):
        ensemble(Source(a=torch.zeros(2, 2)), class_dim=2)(0)


def test_outputs_of_different_shapes() -> None:
    source = Source(a=torch.zeros(2, 3), b=torch.zeros(1, 3))
    with pytest.raises(ConfigError, match=r"sub-net 'b' returns shape \(1, 3\) and 'a' \(2, 3\)"):
        ensemble(source)(0)


def test_what_pick_returns_must_be_a_tensor() -> None:
    with pytest.raises(ConfigError, match="pick returned a int, which cannot be averaged"):
        ensemble(Source(a=torch.zeros(2, 2)), pick=len)(0)


def test_probabilities_taken_for_logits_are_noticed_once() -> None:
    probabilities = torch.tensor([[0.25, 0.75], [0.5, 0.5]])
    both = ensemble(Source(a=probabilities))
    with pytest.warns(UserWarning, match=r"seems to return probabilities.*pick=lambda output: output.log"):
        both(0)
    both(0)
    right = ensemble(Source(a=probabilities), pick=lambda output: output.log())
    assert torch.allclose(right.predict(0).mean, probabilities)


# The accessor


def test_elastic_ensemble(elastic: Elastic, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = importlib.metadata.EntryPoint(
        "ensemble", "ast_plugin.integrations.family.ensembles:ensemble", "ast_plugin.elastic"
    )

    def entry_points(**wanted: str) -> list[importlib.metadata.EntryPoint]:
        return [entry] if wanted.get("group") == entry.group and wanted.get("name", entry.name) == entry.name else []

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
    both = elastic.ensemble(["s50", "s80"])
    assert isinstance(both, Ensemble)
    assert torch.equal(both(images()), ensemble(elastic)(images()))
    assert "ensemble" in dir(elastic)


# Hugging Face


@pytest.mark.extra("hf")
def test_an_output_of_transformers_comes_back_with_its_logits_alone() -> None:
    from transformers.modeling_outputs import SequenceClassifierOutput, TokenClassifierOutput

    output = SequenceClassifierOutput(loss=torch.tensor(1.0), logits=logits([0.9, 0.1]), hidden_states=None)
    other = SequenceClassifierOutput(loss=torch.tensor(2.0), logits=logits([0.5, 0.5]))
    answer = ensemble(Source(a=output, b=other))(input_ids=torch.zeros(1, 2))
    assert type(answer) is SequenceClassifierOutput
    assert answer.logits.softmax(-1).flatten().tolist() == pytest.approx([0.7, 0.3])
    assert list(answer) == ["logits"]
    tokens = TokenClassifierOutput(logits=torch.randn(1, 4, 3))
    assert ensemble(Source(a=tokens)).predict(0).disagreement.shape == (1, 4)
