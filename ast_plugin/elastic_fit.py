"""Whether an elastic file and a model belong together, and the model's tensors by the names that files use."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ast_plugin.elastic_contents import ElasticContents, StoredTensor
from ast_plugin.errors import ActivationError, ElasticFileError
from ast_plugin.slots import bare_model, plain_name

_SHOWN = 3  # differences of one kind that a message lists


class ModelTensors(Mapping[str, Tensor]):
    """The parameters and persistent buffers of a model by state-dict name, looked up at every use.

    Args:
        model: The model; names are those of the bare model inside wrappers.

    Attributes:
        unreachable: Names in the state dict that are neither parameters nor buffers.
    """

    def __init__(self, model: nn.Module) -> None:
        bare = bare_model(model)
        self._slots: dict[str, tuple[Any, str]] = {}
        self._first: dict[str, str] = {}
        seen: dict[int, str] = {}
        for path, module in bare.named_modules(remove_duplicate=False):
            hidden = module._non_persistent_buffers_set
            slots: dict[str, Any]
            for slots in (module._parameters, module._buffers):
                for attribute, tensor in slots.items():
                    if tensor is None or (slots is module._buffers and attribute in hidden):
                        continue
                    name = plain_name(f"{path}.{attribute}" if path else attribute)
                    self._slots[name] = (slots, attribute)
                    self._first[name] = seen.setdefault(id(tensor), name)
        self.unreachable = [name for name in map(plain_name, bare.state_dict(keep_vars=True)) if name not in self]

    def __getitem__(self, name: str) -> Tensor:
        slots, attribute = self._slots[name]
        tensor = slots.get(attribute)
        if not isinstance(tensor, Tensor):
            raise ActivationError(f"{name!r} is gone from the model; load the elastic file again")
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._slots)

    def __len__(self) -> int:
        return len(self._slots)

    def slot(self, name: str) -> tuple[Any, str]:
        """Return the module's dict that holds the tensor, and the key in it."""
        return self._slots[name]

    def first_name(self, name: str) -> str:
        """Return the name that stands for all names of a tied tensor."""
        return self._first[name]

    def unique(self) -> list[str]:
        """Return the names, of tied tensors the first one only."""
        return [name for name, first in self._first.items() if name == first]


def file_names(contents: ElasticContents) -> dict[str, str]:
    """Return the name in the file for each name that a model without compiled parts has."""
    return {plain_name(name): name for name in contents.entries}


def check_fit(contents: ElasticContents, tensors: ModelTensors) -> None:
    """Raise unless the file can be loaded into the model as a whole. Nothing is changed.

    Raises:
        ElasticFileError: With the first differences of each kind: missing, unexpected, shape, dtype, tying.
    """
    differences = _differences(contents, tensors)
    if differences:
        raise ElasticFileError(
            f"{contents.path!r} was made for another architecture ({len(contents.entries)} tensors in the file, "
            f"{len(tensors)} in the model): {'; '.join(differences)}. Nothing was changed; build the model as it was "
            "when the file was saved, then load again"
        )


def _differences(contents: ElasticContents, tensors: ModelTensors) -> list[str]:
    names = file_names(contents)
    shapes, dtypes, kinds = [], [], []
    for name in tensors:
        tensor = tensors[name]
        if is_lazy(tensor):
            kinds.append(f"{name} has no shape yet (run the model once)")
        elif tensor.is_meta:
            kinds.append(f"{name} is on the meta device (call model.to_empty(device=...))")
        elif tensor.layout != torch.strided or tensor.is_quantized or hasattr(tensor, "device_mesh"):
            kinds.append(f"{name} is a {type(tensor).__name__} of {tensor.dtype}, not an ordinary dense tensor")
        elif tensor.is_inference():
            kinds.append(f"{name} was made under torch.inference_mode (build the model outside it)")
        elif name in names:
            entry = contents.entries[names[name]]
            if tuple(tensor.shape) != entry.shape:
                shapes.append(f"{name} is {entry.shape} in the file and {tuple(tensor.shape)} in the model")
            elif not _convertible(entry, tensor):
                dtypes.append(f"{name} is {entry.dtype} in the file and {str(tensor.dtype)[6:]} in the model")
    found = [
        listing("the model lacks", [name for name in names if name not in tensors]),
        listing("the file lacks", [name for name in tensors if name not in names]),
        listing("other shape:", shapes),
        listing("other type:", dtypes),
        listing("cannot be loaded into:", kinds),
        listing("no parameter or buffer, so it cannot be loaded into:", tensors.unreachable),
    ]
    if not any(found):
        found.append(listing("tied in the model but not in the file:", _wrongly_tied(contents, tensors, names)))
    return [line for line in found if line]


def _convertible(entry: StoredTensor, tensor: Tensor) -> bool:
    stored = entry.torch_dtype
    if stored.is_floating_point:
        return tensor.dtype.is_floating_point
    return stored == tensor.dtype


def _wrongly_tied(contents: ElasticContents, tensors: ModelTensors, names: Mapping[str, str]) -> list[str]:
    """Return the names that share one tensor in the model and have two different ones in the file."""
    wrong = []
    for name in tensors:
        first = tensors.first_name(name)
        if name == first:
            continue
        stored = [contents.entries[names[n]].same_as or names[n] for n in (first, name)]
        if stored[0] != stored[1] and not all(
            torch.equal(contents.tensor(sub_net, stored[0]), contents.tensor(sub_net, stored[1]))
            for sub_net in contents.sub_nets
        ):
            wrong.append(f"{first} and {name}")
    return wrong


def listing(heading: str, items: Sequence[str]) -> str:
    """Return one kind of difference as a phrase with its first items, empty where there is none.

    Args:
        heading: What is wrong with them.
        items: Names, or phrases.
    """
    if not items:
        return ""
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return f"{heading} {', '.join(items[:_SHOWN])}{more}"
