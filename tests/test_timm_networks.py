"""The network is found inside everything that a timm script puts around it."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.task import ClassificationTask, FeatureDistillationTask
from timm.utils import ModelEmaV2, ModelEmaV3
from torch import nn

from ast_plugin.integrations.timm.networks import network_in

pytestmark = pytest.mark.extra("timm")


@pytest.fixture
def network() -> nn.Module:
    return timm.create_model("test_resnet", num_classes=10)


def test_a_network_is_itself(network: nn.Module) -> None:
    assert network_in(network) is network


def test_a_compiled_network_is_inside(network: nn.Module) -> None:
    assert network_in(torch.compile(network, backend="eager")) is network


@pytest.mark.parametrize("kind", [ModelEmaV2, ModelEmaV3])
def test_an_average_holds_its_own_network(kind: type[nn.Module], network: nn.Module) -> None:
    average = kind(network)
    assert network_in(average) is average.module
    assert network_in(torch.compile(average, backend="eager")) is average.module
    assert network_in(average) is not network


def test_a_student_is_inside_what_is_trained_with_features(network: nn.Module) -> None:
    teacher = timm.create_model("test_byobnet", num_classes=10)
    task = FeatureDistillationTask(student_model=network, teacher_model=teacher)
    trained = task.get_trainable_module()
    assert trained is not network
    assert network_in(trained) is network
    assert network_in(ModelEmaV3(trained)).state_dict().keys() == network.state_dict().keys()


def test_what_a_task_trains_is_the_network(network: nn.Module) -> None:
    task = ClassificationTask(model=network, criterion=nn.CrossEntropyLoss())
    assert network_in(task.get_trainable_module()) is network
