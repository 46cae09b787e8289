"""An alternating run written down a second time, without a single hook, to compare the library with.

It follows the order of events of a step in plain sight: copies of the weights are multiplied by the mask and handed to
``torch.func.functional_call``, their dense gradients are masked, clipped, projected and given to the optimizer. Every
sub-net has BatchNorm parameters of its own, which are simply further parameters of one optimizer. Shared with the
library are the choice of parameters, the rule by which a mask update picks weights, and (unless told otherwise) the
arithmetic of the projection, so that runs can be compared bit for bit; all three have tests of their own.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from networks import SETTINGS, snapshot
from torch import Tensor, nn
from torch.func import functional_call

import ast_plugin
from ast_plugin.correction import correct
from ast_plugin.kept import POSITIONS_UP_TO
from ast_plugin.masks import MaskStore
from ast_plugin.plans import build_plans
from ast_plugin.plugins import PluginRegistry
from ast_plugin.schedules import resolve_calendars
from ast_plugin.slots import bare_model
from ast_plugin.updates import MaskUpdater

BuildOptimizer = Callable[[Any], torch.optim.Optimizer]
Network = Callable[..., Any]
Loss = Callable[[Network], Tensor]
Project = Callable[[Tensor, Tensor], Tensor]


def project_by_hand(gradient: Tensor, reference: Tensor) -> Tensor:
    """Return g - (<g, r> / <r, r>) r where <g, r> < 0, else g itself; the products in float64."""
    g, r = gradient.double().flatten(), reference.double().flatten()
    inner, square = float(g @ r), float(r @ r)
    if inner < 0 < square:
        return (gradient.double() - inner / square * reference.double()).to(gradient.dtype)
    return gradient


def project_as_the_library(gradient: Tensor, reference: Tensor) -> Tensor:
    """The same in the library's own arithmetic, in place: how sums are rounded depends on where vectors lie."""
    correct([gradient], [reference], scope="layer")
    return gradient


def _laid_out(vectors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Put vectors one behind the other in memory, as the library does."""
    whole = torch.cat(list(vectors.values()))
    return dict(zip(vectors, whole.split([len(vector) for vector in vectors.values()]), strict=True))


class ReferenceRun:
    """A run with the settings of `networks.wrapped`.

    Args:
        model: Where it starts from; a copy of it is trained.
        build: Makes the optimizer from an object that has ``parameters()``.
        project: The projection of a gradient against a reference.
        options: Settings of ``wrap``, beside those that tests use by default.

    Attributes:
        model: The dense network, with the default's BatchNorm.
        number: Steps that were made.
    """

    def __init__(
        self, model: nn.Module, build: BuildOptimizer, *, project: Project = project_as_the_library, **options: Any
    ) -> None:
        self.project = project
        self.model = copy.deepcopy(model)
        self.config = ast_plugin.ASTConfig(**{**SETTINGS, **options})
        registry = PluginRegistry(())
        self.registry = registry
        specs = self.config.sub_nets
        self.names = tuple(spec.name for spec in specs)
        patterns = {spec.name: registry.pattern(spec.pattern or self.config.pattern) for spec in specs}
        plans = build_plans(self.config, patterns, resolve_calendars(self.config, len(specs)))
        self.default = min(plans, key=lambda plan: plan.target_sparsity).name
        choices = registry.select_parameters(self.model, include=self.config.include, exclude=self.config.exclude)
        self.prunable = [choice.name for choice in choices if choice.prunable]
        self.parameters = dict(self.model.named_parameters())
        self.masks = MaskStore(self.names, {name: tuple(self.parameters[name].shape) for name in self.prunable})
        self.method = registry.method(self.config.method)
        distribution = registry.distribution(self.config.distribution or self.method.distribution)
        self.updater = MaskUpdater(self.config, plans, method=self.method, distribution=distribution, masks=self.masks)
        self.updater.initialize({name: self.parameters[name] for name in self.prunable})
        self.private = {name: self._own_norms(copied=name != self.default) for name in self.names}
        owned = {id(tensor): tensor for tensor in self.parameters.values()}
        owned |= {
            id(tensor): tensor
            for norms in self.private.values()
            for tensor in norms.values()
            if isinstance(tensor, nn.Parameter)
        }
        self.optimizer = build(types.SimpleNamespace(parameters=lambda: list(owned.values())))
        self.number = 0
        self.last: dict[str, int | None] = dict.fromkeys(self.names)
        self.previous: dict[str, Tensor] = {}
        self.conflicts = 0

    def _own_norms(self, *, copied: bool) -> dict[str, Tensor]:
        """Return the BatchNorm tensors of one sub-net by name: the model's, or copies."""
        own: dict[str, Tensor] = {}
        if not self.config.private_normalization or len(self.names) == 1:
            return own
        for path, module in self.model.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                for tensors in (module._parameters, module._buffers):
                    for attribute, tensor in tensors.items():
                        if tensor is not None:
                            own[f"{path}.{attribute}"] = copy.deepcopy(tensor) if copied else tensor
        return own

    @property
    def scheduled(self) -> str:
        return self.names[self.number % len(self.names)]

    def step(
        self,
        losses: Sequence[Loss],
        *,
        clip: Callable[[list[nn.Parameter]], Any] | None = None,
        happens: bool = True,
    ) -> None:
        """Make one step.

        Args:
            losses: One a micro-batch: from the network to the loss; their gradients add up.
            clip: Called with the sub-net's parameters, whose gradients it may change.
            happens: False: an overflow was found; nothing but running statistics may have moved.
        """
        name = self.scheduled
        tensors: dict[str, Tensor] = {**dict(self.model.named_buffers()), **self.parameters, **self.private[name]}
        leaves = {
            n: torch.where(self.masks.get(name, n), tensors[n], 0).detach().requires_grad_() for n in self.prunable
        }
        for loss in losses:
            loss(lambda *args, **kwargs: functional_call(self.model, {**tensors, **leaves}, args, kwargs)).backward()
        dense = {n: leaf.grad for n, leaf in leaves.items() if leaf.grad is not None}
        for n, gradient in dense.items():
            self.parameters[n].grad = torch.where(self.masks.get(name, n), gradient, 0)
        if clip is not None:
            clip([tensors[n] for n in self.parameters])  # type: ignore[misc]  # parameters all of them
        if happens:
            self._update_masks(name, dense)
            self._correct(name)
            before = {n: self._elementwise(n) for n in self.prunable}
            self.optimizer.step()
            if self.config.inactive == "freeze":
                self._freeze(name, before)
            self.last[name] = self.number
            self.number += 1
        self.optimizer.zero_grad()

    def _update_masks(self, name: str, dense: dict[str, Tensor]) -> None:
        if not self.updater.is_due(name, self.number, self.last[name]):
            return
        weights = {n: self.parameters[n] for n in self.prunable}
        update = self.updater.update(name, self.number, weights, dense if self.method.needs_gradient else None)
        for n in dense:
            self.parameters[n].grad = torch.where(self.masks.get(name, n), self.parameters[n].grad, 0)
        if (self.config.grow_initialization or self.method.grow_initialization) == "zero":
            for n, grown in update.grown.items():
                for other in self.names:
                    grown = grown & ~self.masks.get(other, n) if other != name else grown
                state = self.optimizer.state.get(self.parameters[n], {}).values()
                with torch.no_grad():
                    for tensor in (self.parameters[n], *state):
                        if isinstance(tensor, Tensor) and tensor.shape == grown.shape:
                            tensor[grown] = 0

    def _correct(self, name: str) -> None:
        gradients = {n: self.parameters[n].grad for n in self.prunable if self.parameters[n].grad is not None}
        uncorrected = {n: gradient.clone() for n, gradient in gradients.items()}
        if self.config.correction_options.scope == "layer" and self.number % len(self.names):
            where = {n: self._compared(name, n) for n in self.prunable}
            present = {n: gradients.get(n, torch.zeros_like(self.parameters[n])) for n in self.prunable}
            previous = {n: self.previous.get(n, torch.zeros_like(self.parameters[n])) for n in self.prunable}
            ours = _laid_out({n: gradient[where[n]] for n, gradient in present.items()})
            theirs = _laid_out(
                {n: (reference * self.masks.get(name, n))[where[n]] for n, reference in previous.items()}
            )
            for n in gradients:
                if n in self.previous:
                    corrected = self.project(ours[n], theirs[n])
                    self.conflicts += not torch.equal(corrected, gradients[n][where[n]])
                    gradients[n][where[n]] = corrected
        self.previous = uncorrected

    def _compared(self, name: str, n: str) -> Tensor:
        """Return which weights take part: the library adds up the kept ones alone where these are few."""
        kept = self.masks.get(name, n)
        few = self.masks.kept(name) <= POSITIONS_UP_TO * self.masks.total()
        return kept if few else torch.ones_like(kept)

    def _elementwise(self, n: str) -> dict[str, Tensor]:
        """Return copies of a weight and of the optimizer state that has its shape."""
        state = self.optimizer.state.get(self.parameters[n], {})
        return {key: t.detach().clone() for key, t in {"": self.parameters[n], **state}.items() if self._fits(n, t)}

    def _fits(self, n: str, tensor: Any) -> bool:
        return isinstance(tensor, Tensor) and tensor.shape == self.parameters[n].shape

    def _freeze(self, name: str, before: dict[str, dict[str, Tensor]]) -> None:
        """Put back what the step moved outside the mask; state that is new there becomes zero."""
        with torch.no_grad():
            for n in self.prunable:
                kept = self.masks.get(name, n)
                for key, tensor in {"": self.parameters[n], **self.optimizer.state.get(self.parameters[n], {})}.items():
                    if self._fits(n, tensor):
                        tensor.copy_(torch.where(kept, tensor, before[n].get(key, torch.zeros_like(tensor))))

    def private_state(self, name: str) -> dict[str, Tensor]:
        return {n: tensor.detach().clone() for n, tensor in self.private[name].items()}


def assert_runs_agree(
    ast: ast_plugin.AlternatingSparseTraining, reference: ReferenceRun, *, rtol: float = 0.0, atol: float = 0.0
) -> None:
    """Compare dense weights, masks and every sub-net's BatchNorm; masks always bit for bit."""
    assert ast.step == reference.number
    for name in ast.sub_nets:
        for parameter in ast.masks.parameters:
            ours, theirs = ast.masks.get(name, parameter), reference.masks.get(name, parameter)
            assert torch.equal(ours, theirs), f"masks of {parameter} in {name} differ in {int((ours != theirs).sum())}"
    ours_by_name = {("dense", n): t for n, t in snapshot(bare_model(ast.model)).items()}
    theirs_by_name = {("dense", n): t for n, t in snapshot(reference.model).items()}
    for name in ast.sub_nets:
        ours_by_name |= {(name, n): t for n, t in ast.private_state(name).items()}
        theirs_by_name |= {(name, n): t for n, t in reference.private_state(name).items()}
    assert_close(ours_by_name, theirs_by_name, rtol=rtol, atol=atol)


def assert_close(ours: dict[Any, Tensor], theirs: dict[Any, Tensor], *, rtol: float, atol: float) -> None:
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[key], rtol=rtol, atol=atol, msg=lambda m, key=key: f"{key}: {m}")


def reference_steps(
    reference: ReferenceRun, batches: Iterable[tuple[Tensor, Tensor]], loss: Callable[..., Tensor]
) -> None:
    """Make one step a batch; `loss` takes what the network returns, and the labels."""
    for inputs, labels in batches:
        reference.step([lambda network, inputs=inputs, labels=labels: loss(network(inputs), labels)])
