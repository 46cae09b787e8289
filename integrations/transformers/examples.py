"""What a Trainer's model can be called with, to find out which of its channels belong together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ast_plugin.channel_search import example_inputs_of
from ast_plugin.random_state import RandomState
from ast_plugin.slots import bare_model

if TYPE_CHECKING:
    from transformers import Trainer

_LABELS = ("labels", "label", "label_ids")


def example_inputs(trainer: Trainer) -> Any:
    """Return the model's own example inputs, or else one example of the first training batch, without its labels.

    The random generators are as before afterwards, so that the training that follows is the same.

    Args:
        trainer: The Trainer, ready to train.
    """
    model = bare_model(trainer.model)
    own = example_inputs_of(model)
    if own is not None:
        return own
    state = RandomState()
    before = state.state_dict()
    try:
        batch = next(iter(trainer.get_train_dataloader()))
    finally:
        state.load_state_dict(before)
    if not isinstance(batch, Mapping):
        return None
    size = next((len(value) for value in batch.values() if isinstance(value, Tensor) and value.dim()), 0)
    given = {name: value for name, value in batch.items() if name not in _LABELS}
    return {name: v[:1] if isinstance(v, Tensor) and v.dim() and len(v) == size else v for name, v in given.items()}
