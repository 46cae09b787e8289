"""What units of channel groups lie in beside the masked weights: biases and normalization, as a sub-net has them."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor, nn

from ast_plugin.channels import ChannelGroups
from ast_plugin.normalization import PrivateNormalization
from ast_plugin.sharding import full


class ChannelStates:
    """Reads these tensors from the model, and from where the private ones of a sub-net are.

    Args:
        model: The network whose tensors the groups name.
        groups: The groups.
        normalization: The private BatchNorm states of the sub-nets.
        masked: Names of the weights that masks apply to, which are left out.

    Attributes:
        model: The same.
    """

    def __init__(
        self, model: nn.Module, groups: ChannelGroups, normalization: PrivateNormalization, masked: Collection[str]
    ) -> None:
        self.model = model
        self._normalization = normalization
        self._names = tuple(name for name in groups.tensors if name not in masked)

    def of(self, sub_net: str) -> dict[str, Tensor]:
        """Return the tensors by name, whole on every rank and without gradient; a collective where they are sharded.

        Private ones are copies, the others share memory with the model.
        """
        private = self._normalization.state(sub_net)
        buffers = dict(self.model.named_buffers(remove_duplicate=False))
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        found = {}
        for name in self._names:
            tensor = private.get(name, parameters.get(name, buffers.get(name)))
            if tensor is not None:
                found[name] = full(tensor).detach()
        return found
