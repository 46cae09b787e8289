"""Sub-nets from an elastic file on a model without an optimizer, switched at run time by pointer.

Every tensor that differs between sub-nets is built once for each of them when the file is loaded; a switch then
only tells the model's tensors which memory to use. How that is done was measured; benchmarks/switching.py repeats it
(the 318 tensors of a ResNet-50 that differ, one core of an AMD EPYC):

* ``tensor.data = prebuilt``, chosen: 0.06 ms, with all checks 0.2 ms. Tied weights, LSTMs (whose module keeps a list of
  its own), optimizers and compiled graphs all hold the tensor object itself and see the new memory; compiled code is
  not compiled again.
* Replacing the entry in ``module._parameters``, 0.01 ms: leaves all of those but the compiled graphs behind with the
  old weights, without a word.
* Copying into the tensor, 8 ms; multiplying the dense weights by a mask, 12 ms; loading a dense file, 19 ms.

Swapping ``.data`` is no way to train (`ast_plugin.activation` says why): graphs, FSDP and activation checkpoints keep
memory of their own between forward and backward. Here nothing is in flight between two calls of the model.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from ast_plugin.attachment import is_attached
from ast_plugin.channels import ChannelGroups
from ast_plugin.compile import compile_sub_net
from ast_plugin.elastic_accessors import accessor, accessor_names
from ast_plugin.elastic_channels import check_channel, stored_groups, stored_units
from ast_plugin.elastic_contents import ElasticContents
from ast_plugin.elastic_file import read_elastic
from ast_plugin.elastic_fit import ModelTensors, check_fit, file_names
from ast_plugin.errors import ActivationError, ConfigError, WrapError
from ast_plugin.files import file_path
from ast_plugin.sub_nets import check_sub_net

# The token of the last Elastic of each model: two would take each other's tensors for the model's own.
_current: weakref.WeakKeyDictionary[nn.Module, object] = weakref.WeakKeyDictionary()


def load(path: str | os.PathLike[str], model: nn.Module) -> Elastic:
    """Load an elastic file into a model of the same architecture, ready to switch between its sub-nets.

    Everything is checked before the model is touched. Values go to the device and floating-point type that each of the
    model's tensors has. The default sub-net is active afterwards; training mode and ``requires_grad`` stay as they are.

    Args:
        path: An elastic file, or a folder with one named ``elastic.safetensors``.
        model: The network, built as it was for training; also compiled, or wrapped for data-parallel use.

    Raises:
        ConfigError: If `path` is no path, or `model` no model.
        ElasticFileError: If the file is missing, foreign, damaged or too new, or was made for another architecture; the
            message lists the first differences. The model is unchanged then.
        WrapError: If the model is still being trained by `ast_plugin.wrap`, which masks its weights itself.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model must be a torch.nn.Module, got {type(model).__name__}; call load(path, model)")
    file_path(path)
    if is_attached(model):
        raise WrapError(
            f"{os.fspath(path)!r} cannot be loaded into a model that is wrapped for training: call detach() on its "
            "controller first, or load into another model"
        )
    contents = read_elastic(path)
    tensors = ModelTensors(model)
    check_fit(contents, tensors)
    return Elastic(model, contents, tensors)


class Elastic:
    """A model that can be any sub-net of an elastic file; `load` makes it.

    The tensors of the active sub-net are the model's own: what changes the model in place (an optimizer, BatchNorm in
    training mode, ``load_state_dict``) changes that sub-net, and in tensors that all share, such as biases, all of
    them. Nothing holds the zeros in place then: a sub-net that is trained on as an ordinary model becomes dense.
    ``model.to(...)`` may be used; the other sub-nets follow at the next switch. A switch concerns the model, hence
    every thread that uses it: do not switch during a forward pass, nor between one and its backward pass.

    Installed packages may add functions, which are called as methods (`ast_plugin.elastic_accessors`).

    Args:
        model: The model as the caller uses it.
        contents: What `read_elastic` returned.
        tensors: The model's tensors, already found to fit.

    Attributes:
        model: The model as the caller uses it.
        path: The file that it came from.
        sub_nets: Names of the sub-nets.
        default_sub_net: The one that is active after loading.
        records: What the file says about each sub-net, by name.
        header: What the run that wrote the file put in its header.
    """

    def __init__(self, model: nn.Module, contents: ElasticContents, tensors: ModelTensors) -> None:
        self.model = model
        self.path = contents.path
        self.sub_nets = contents.sub_nets
        self.default_sub_net = contents.default_sub_net
        self.records = contents.records
        self.header = contents.header
        self._groups = stored_groups(contents.path, contents.header)
        self._units = stored_units(contents)
        self._tensors = tensors
        stored = file_names(contents)
        self._swapped = [name for name in tensors.unique() if not contents.is_shared(stored[name])]
        # Tensors made under inference mode could never take part in training later.
        with torch.inference_mode(False), torch.no_grad():
            self._own = {
                sub_net: [_like(tensors[name], contents.tensor(sub_net, stored[name])) for name in self._swapped]
                for sub_net in self.sub_nets
            }
            swapped = set(self._swapped)
            for name in tensors.unique():
                if name not in swapped:
                    tensors[name].copy_(contents.tensor(self.default_sub_net, stored[name]))
        self._active = self.default_sub_net
        self._slots = [tensors.slot(name) for name in self._swapped]
        self._addresses = {sub_net: [tensor.data_ptr() for tensor in own] for sub_net, own in self._own.items()}
        self._install(self._own[self._active])
        self._token = object()
        _current[model] = self._token

    @property
    def active(self) -> str:
        """Name of the sub-net that the model is now."""
        return self._active

    @property
    def metrics(self) -> dict[str, dict[str, float]]:
        """Sub-net name -> metric name -> value, as saved with the file."""
        return {name: dict(record.metrics) for name, record in self.records.items()}

    @property
    def groups(self) -> ChannelGroups | None:
        """The channel groups of the file; None where no sub-net is of the pattern ``channel``."""
        return self._groups

    def kept_channels(self, name: str) -> dict[str, Tensor]:
        """Return the units that a channel sub-net keeps.

        Args:
            name: The sub-net.

        Returns:
            By group name, bool (units,), True = kept.

        Raises:
            ConfigError: If there is no such sub-net, or it is none of pattern ``channel``.
        """
        check_sub_net(name, self.sub_nets)
        check_channel(self.path, self.records[name], self._groups)
        return {group: flags.clone() for group, flags in self._units[name].items()}

    def switch(self, name: str) -> None:
        """Make the model the sub-net `name`. Takes about 0.2 ms for a ResNet-50, whatever the sizes of its tensors.

        Raises:
            ConfigError: If there is no such sub-net; the message offers the near names.
            ActivationError: If tensors of the model were taken away or reshaped since it was loaded, another file was
                loaded into it, or it is being trained by `ast_plugin.wrap`. Nothing has changed then.
        """
        check_sub_net(name, self.sub_nets)
        self._check_current()
        if name == self._active:
            return
        self._follow_model()
        before = self._active
        try:
            self._install(self._own[name])
            self._active = name
        except BaseException:
            # An interrupt in between must not leave a model that is half one sub-net and half another.
            self._install(self._own[before])
            self._active = before
            raise

    @contextlib.contextmanager
    def sub_net(self, name: str) -> Iterator[nn.Module]:
        """Make the model the sub-net `name` for the duration of a ``with`` block, and then what it was before.

        Args:
            name: The sub-net.

        Yields:
            The model.

        Raises:
            ConfigError: If there is no such sub-net.
        """
        before = self._active
        self.switch(name)
        try:
            yield self.model
        finally:
            self.switch(before)

    def materialize(self, name: str) -> dict[str, Tensor]:
        """Return a sub-net as an ordinary state dict, whichever is active.

        Args:
            name: The sub-net.

        Returns:
            New tensors on the model's devices, in the order and with the names of the bare model's state dict. Tied
            entries are one tensor.

        Raises:
            ConfigError: If there is no such sub-net.
            ActivationError: As for `switch`.
        """
        check_sub_net(name, self.sub_nets)
        self._check_current()
        self._follow_model()
        own = dict(zip(self._swapped, self._own[name], strict=True))
        with torch.inference_mode(False), torch.no_grad():
            state = {key: own.get(key, self._tensors[key]).detach().clone() for key in self._tensors.unique()}
        return {key: state[self._tensors.first_name(key)] for key in self._tensors}

    def compile(
        self,
        name: str,
        form: str = "auto",
        example_inputs: Any = None,
        *,
        block_size: int | None = None,
        multiple: int = 1,
        seconds: float = 5.0,
    ) -> nn.Module:
        """Return one sub-net as a module of its own, in eval mode and without gradients, for fast inference.

        The model of this object is not touched, and the module depends on it no more. Where `example_inputs` are given,
        its outputs are compared with those of the dense form.

        The module's attribute ``compiled_form``, a plain dict, tells ``sub_net`` and ``form``; for ``csr``, ``bsr`` and
        ``2:4`` also ``layers``, what became of each linear layer and what was measured; for ``auto``
        ``measured_ms``, the median time of each whole form, and ``left_out``, why others were not measured.

        Args:
            name: The sub-net.
            form: ``dense``: an ordinary model with zeros in it. ``sliced``: the dropped units of a channel sub-net are
                cut out. ``csr`` and ``bsr``: linear layers, `torch.nn.Linear` and Hugging Face's ``Conv1D``, whose
                weights are held compressed, by weight or by block; only where that was measured to be faster, or
                without example inputs where there are zeros enough (85 % and 75 %). ``2:4``: linear layers in torch's
                semi-structured form, on CUDA in half precision. ``auto``: the fastest of these on this machine.
            example_inputs: What the module will be called with: a tensor, a tuple of positional arguments or a dict of
                keyword arguments, on the model's device. ``auto`` needs it.
            block_size: Edge of the square blocks of ``bsr``; None: that of the sub-net's pattern, otherwise 8.
            multiple: In the form ``sliced``, leave as many channels and hidden units of each group as make a multiple
                of this; those that are added have zeros as weights.
            seconds: How long to measure, about.

        Raises:
            ConfigError: If there is no such sub-net or form, or the form does not fit the sub-net or the machine, or
                `example_inputs` do not fit the model; the message says what does.
            ActivationError: As for `switch`, or if a form changes the outputs.
        """
        return compile_sub_net(
            self, name, form, example_inputs, block_size=block_size, multiple=multiple, seconds=seconds
        )

    def __repr__(self) -> str:
        return f"Elastic({self.path!r}, sub_nets={self.sub_nets!r}, active={self._active!r})"

    if not TYPE_CHECKING:  # a checker would take every misspelt attribute for one that a package adds

        def __getattr__(self, name: str) -> Any:
            return accessor(self, name)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *accessor_names()})

    def _check_current(self) -> None:
        if _current.setdefault(self.model, self._token) is not self._token:  # a copied model has no owner yet
            raise ActivationError(
                f"another elastic file was loaded into this model after {self.path!r}; use what that load returned, or "
                "load this file again"
            )
        if is_attached(self.model):
            raise ActivationError(
                "the model is wrapped for training now, and its controller masks the weights itself; call detach() on "
                "the controller and load the file again"
            )

    def _install(self, own: list[Tensor]) -> None:
        for (slots, attribute), tensor in zip(self._slots, own, strict=True):
            target = slots[attribute]
            target.data = tensor
            # A backward pass over another sub-net's forward pass now raises; its gradients would be silently wrong.
            increment_version(target)
        # Autocast keeps low-precision copies by tensor object, which stays the same; they would be the old weights.
        torch.clear_autocast_cache()

    def _follow_model(self) -> None:
        """Notice tensors that were moved, converted or replaced since the last switch, and adopt them.

        Comparing addresses costs a fifth of comparing devices and dtypes, and sees replaced tensors too.
        """
        addresses = self._addresses[self._active]
        try:
            current = [slots[attribute].data_ptr() for slots, attribute in self._slots]
        except (KeyError, AttributeError):
            current = [
                self._tensors[name].data_ptr() for name in self._swapped
            ]  # raises and names the one that is gone
        if current == addresses:
            return
        moved = [index for index, address in enumerate(addresses) if address != current[index]]
        fresh: dict[tuple[str, int], Tensor] = {}
        with torch.inference_mode(False), torch.no_grad():
            for index in moved:
                now = self._tensors[self._swapped[index]].data
                for sub_net in self.sub_nets:
                    own = self._own[sub_net][index]
                    if own.shape != now.shape:
                        raise ActivationError(
                            f"{self._swapped[index]!r} has shape {tuple(now.shape)} now and had {tuple(own.shape)} "
                            f"when {self.path!r} was loaded into the model; load a file that fits"
                        )
                    fresh[sub_net, index] = now if sub_net == self._active else _like(now, own)
        for (sub_net, index), tensor in fresh.items():
            self._own[sub_net][index] = tensor
            self._addresses[sub_net][index] = tensor.data_ptr()


def _like(target: Tensor, source: Tensor) -> Tensor:
    """Return `source` with the device, dtype and memory order of `target`; `source` itself if it has them already."""
    if (source.device, source.dtype, source.stride()) == (target.device, target.dtype, target.stride()):
        return source
    return torch.empty_like(target, requires_grad=False).copy_(source)
