"""Which layers share their channels: torch-pruning's dependency graph, read as spaces.

A *space* is a width that several layers have in common: some produce it with the rows of their weights, some read it
with the columns, and everything between them (norms, depthwise convolutions, activation functions, attention) passes
it on. Layers that produce or read are *dense*: linear layers and convolutions of one group. torch-pruning traces the
model's autograd graph into nodes and edges; the out-sides of dense nodes and all that hangs together with them are
the spaces.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from ast_plugin.channel_search_copy import Call, differentiable, tensors
from ast_plugin.errors import ConfigError, missing_extra

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_OPAQUE = (nn.MultiheadAttention, nn.RNNBase)
_ADDITIONS = ("Add", "Sub", "Lerp", "Addcmul")  # AddmmBackward and its kin are told apart below
_CONCATENATIONS = ("Cat", "Stack")
_PRODUCTS = ("ScaledDotProduct", "Bmm")
_MATRICES = (*_PRODUCTS, "Mm", "Addmm")
_SOFTMAX = ("Softmax", "SafeSoftmax")
_FUNCTIONS = frozenset((functional.linear, functional.conv1d, functional.conv2d, functional.conv3d))
_SPLITTING = ("Split", "Slice", "Unbind", "Glu", "Select", "Unsafe_split")


@dataclasses.dataclass
class Space:
    """A width that layers share.

    Attributes:
        producers: Paths of dense layers whose rows make it, in the order in which the model runs.
        consumers: Paths of dense layers whose columns read it.
        passing: Paths of other modules with tensors that it passes through.
        parameters: Names of parameters that meet it outside of such modules.
        operations: The autograd nodes in it.
        added: Whether activations of different layers are added in it.
        concatenated: Whether they are concatenated.
        computed: Paths of consumers that run with another weight than they hold (standardized ones).
        ends: What it reaches that no group may: an output or input of the model, a module that cannot be looked into.
    """

    producers: list[str] = dataclasses.field(default_factory=list)
    consumers: list[str] = dataclasses.field(default_factory=list)
    passing: list[str] = dataclasses.field(default_factory=list)
    parameters: list[str] = dataclasses.field(default_factory=list)
    operations: list[Any] = dataclasses.field(default_factory=list)
    added: bool = False
    concatenated: bool = False
    computed: list[str] = dataclasses.field(default_factory=list)
    ends: list[str] = dataclasses.field(default_factory=list)

    @property
    def attention(self) -> list[Any]:
        """Return the operations of attention, products of activations and softmax; empty where there is no product."""
        found = [grad_fn for grad_fn in self.operations if _named(grad_fn, (*_PRODUCTS, *_SOFTMAX))]
        return found if any(_named(grad_fn, _PRODUCTS) for grad_fn in found) else []

    @property
    def split(self) -> bool:
        """Return whether something takes it apart."""
        return any(_named(grad_fn, _SPLITTING) for grad_fn in self.operations)


def is_dense(module: nn.Module) -> bool:
    """Return whether a module's rows produce a space and its columns read one."""
    return isinstance(module, nn.Linear) or (isinstance(module, CONVOLUTIONS) and module.groups == 1)


def trace_spaces(model: nn.Module, call: Call) -> list[Space]:
    """Run a model once and return its spaces, those first whose producers run first.

    Args:
        model: A copy that may be run: in eval mode, on the CPU, with parameters that require gradients.
        call: What it is run with.

    Raises:
        MissingExtraError: If torch-pruning is not installed.
        ConfigError: If the model does not run on these inputs, or torch-pruning cannot follow it.
    """
    try:
        import torch_pruning
    except ImportError:
        raise missing_extra("The search for channel groups", "torch-pruning", "channels") from None
    watch = _Watch(model)
    tracked = differentiable(call)
    outputs: list[Tensor] = []

    def forward(_model: nn.Module, _inputs: Any) -> list[Tensor]:
        outputs.extend(tensor for tensor in tensors(watch.run(tracked)) if tensor.grad_fn is not None)
        return outputs

    graph = torch_pruning.DependencyGraph()
    try:
        graph.build_dependency(model, example_inputs=None, forward_fn=forward, verbose=False)
    except Exception as error:
        if watch.error is not None:
            raise watch.error from error
        if not getattr(graph, "module2node", None):
            raise ConfigError(
                f"torch-pruning cannot follow {type(model).__name__} ({type(error).__name__}: {error}); pass "
                "groups=... by hand"
            ) from error
        # Its index mappings are not needed: only nodes and edges, which stand by then.
    if not outputs:
        raise ConfigError(
            f"{type(model).__name__} returns no tensor that depends on its weights, as far as autograd can see; pass "
            "groups=... by hand"
        )
    inputs = [tensor.grad_fn for tensor in tensors((tracked.args, tracked.kwargs)) if tensor.grad_fn is not None]
    return _Spaces(model, graph.module2node.values(), watch, outputs, inputs).found()


class _Watch:
    """Runs a model and notes which modules ran, and which autograd nodes their outputs have."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.paths = {module: path for path, module in model.named_modules()}
        self.order: dict[nn.Module, int] = {}
        self.made: dict[Any, list[nn.Module]] = {}
        self.running: nn.Module | None = None
        self.computed: set[nn.Module] = set()
        self.error: Exception | None = None

    def run(self, call: Call) -> Any:
        hooks = [module.register_forward_hook(self._note) for module in self.paths]
        hooks += [module.register_forward_pre_hook(self._enter) for module in self.paths if is_dense(module)]
        try:
            with _Functions(self):
                return call.of(self._model)
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            self.error = ConfigError(
                f"{type(self._model).__name__} does not run on example_inputs ({type(error).__name__}: {lines[0]}); "
                "pass what its forward takes: a tensor, a tuple of arguments or a dict of keyword arguments"
            )
            raise self.error from error
        finally:
            for hook in hooks:
                hook.remove()

    def _enter(self, module: nn.Module, _args: Any) -> None:
        self.running = module

    def _note(self, module: nn.Module, _args: Any, output: Any) -> None:
        self.running = None
        self.order.setdefault(module, len(self.order))
        made = next(tensors(output), None)
        if made is not None and made.grad_fn is not None:
            self.made.setdefault(made.grad_fn, []).append(module)


class _Functions(TorchFunctionMode):
    """Sees with which weights the functions of linear layers and convolutions are called.

    A linear layer whose weight ``F.linear`` uses outside of it, often with another bias, is shown to torch-pruning as
    if it had run itself. A layer that calls its function with another tensor than its own weight is noted.
    """

    def __init__(self, watch: _Watch) -> None:
        super().__init__()
        self._watch = watch
        layers = (module for module in watch.paths if isinstance(module, nn.Linear))
        self._layers = {id(module._parameters.get("weight")): module for module in layers}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in _FUNCTIONS:
            return func(*args, **kwargs)
        given = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
        running = self._watch.running
        if running is not None and given["weight"] is not running._parameters.get("weight"):
            self._watch.computed.add(running)
        layer = self._layers.get(id(given["weight"]))
        bias = given.get("bias")
        if func is not functional.linear or layer is None or layer is running:
            return func(*args, **kwargs)
        if bias is not None and bias is not layer.bias:
            bias = bias.detach()
        output = func(given["input"], given["weight"], bias)
        for hook in layer._forward_hooks.values():
            hook(layer, (given["input"],), output)
        return output


class _Spaces:
    """Joins the sides of torch-pruning's nodes to spaces."""

    def __init__(
        self, model: nn.Module, nodes: Iterable[Any], watch: _Watch, outputs: list[Tensor], inputs: list[Any]
    ) -> None:
        self._nodes = list(nodes)
        self._watch = watch
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._outputs = {tensor.grad_fn for tensor in outputs}
        self._inputs = set(inputs)
        self._parents: dict[tuple[int, str], tuple[int, str]] = {}
        self._flows = self._all_flows()

    def found(self) -> list[Space]:
        for node in self._nodes:
            for source in node.inputs:
                self._join(self._side(node, "in"), self._side(source, "out"))
        spaces: dict[tuple[int, str], Space] = {}

        def at(node: Any, side: str) -> Space:
            return spaces.setdefault(self._root(self._side(node, side)), Space())

        for node in sorted(self._nodes, key=lambda node: self._watch.order.get(node.module, -1)):
            self._enter(node, at(node, "in"), at(node, "out"))
        return sorted(spaces.values(), key=lambda space: min(map(self._position, space.producers), default=1 << 60))

    def _position(self, path: str) -> int:
        return next(number for module, number in self._watch.order.items() if self._watch.paths[module] == path)

    def _enter(self, node: Any, reading: Space, made: Space) -> None:
        """Note one node in the spaces on its two sides, which are one and the same for all but dense ones."""
        module, path = node.module, self._watch.paths.get(node.module)
        if node.grad_fn in self._outputs:
            made.ends.append("the model's output")
        if isinstance(module, nn.Parameter):
            made.parameters.append(self._names[id(module)])
            return
        if path is not None and is_dense(module):
            made.producers.append(path)
            reading.consumers.append(path)
            if module in self._watch.computed:
                reading.computed.append(path)
            return
        made.operations.append(node.grad_fn)
        if path is not None:
            made.passing.append(path)
            if isinstance(module, _OPAQUE):
                made.ends.append(f"{type(module).__name__} {path}, which no search can look into")
        for other in self._watch.made.get(node.grad_fn, []):
            if other is not module and any(True for _ in _own_tensors(other)):
                made.passing.append(self._watch.paths[other])
        if node.grad_fn in self._inputs:
            made.ends.append("the model's input")
        flows = {self._flows[source] | self._source(source) for source in node.inputs} - {0}
        widest = max(flows, key=int.bit_count, default=0)
        if any(flow | widest != widest for flow in flows):  # from other layers, not the same ones by another way
            made.added |= _named(node.grad_fn, _ADDITIONS) and not self._is_score(node)
            made.concatenated |= _named(node.grad_fn, _CONCATENATIONS)

    def _all_flows(self) -> dict[Any, int]:
        """Return, for each node, from which sources its activations come without another source between, as bits."""
        bits = iter(range(len(self._nodes)))
        self._bits = {node: 1 << next(bits) for node in self._nodes if self._is_source(node)}
        flows = dict.fromkeys(self._nodes, 0)
        waiting = list(self._nodes)
        while waiting:
            node = waiting.pop()
            flow = flows[node]
            for source in node.inputs:
                flow |= self._source(source) or flows[source]
            if flow != flows[node]:
                flows[node] = flow
                waiting.extend(node.outputs)
        return {node: 0 if node in self._bits else flow for node, flow in flows.items()}

    def _is_score(self, node: Any) -> bool:
        """Return whether a node leads to a softmax: attention scores, to which biases of positions are added."""
        waiting, seen = list(node.outputs), {node}
        while waiting:
            node = waiting.pop()
            if _named(node.grad_fn, _SOFTMAX):
                return True
            if node not in seen and node.module not in self._watch.paths and not _named(node.grad_fn, _MATRICES):
                waiting.extend(node.outputs)
            seen.add(node)
        return False

    def _is_source(self, node: Any) -> bool:
        module = node.module
        if node.grad_fn in self._inputs or isinstance(module, (nn.Embedding, *_OPAQUE)):
            return True
        return module in self._watch.paths and is_dense(module)

    def _source(self, node: Any) -> int:
        return self._bits.get(node, 0)

    def _side(self, node: Any, side: str) -> tuple[int, str]:
        dense = node.module in self._watch.paths and is_dense(node.module)
        return id(node), side if dense else "both"

    def _root(self, key: tuple[int, str]) -> tuple[int, str]:
        self._parents.setdefault(key, key)
        while self._parents[key] != key:
            self._parents[key] = self._parents[self._parents[key]]
            key = self._parents[key]
        return key

    def _join(self, one: tuple[int, str], other: tuple[int, str]) -> None:
        self._parents[self._root(one)] = self._root(other)


def _own_tensors(module: nn.Module) -> Iterable[Tensor]:
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)


def _named(grad_fn: Any, kinds: tuple[str, ...]) -> bool:
    name = grad_fn.name() if hasattr(grad_fn, "name") else ""
    kind = name.partition("Backward")[0]
    return any(kind == wanted or (wanted == "ScaledDotProduct" and kind.startswith(wanted)) for wanted in kinds)
