"""Where a network of Hugging Face reads its input and where its labels are read from: layers that stay dense."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from ast_plugin.integrations.layers import CONVOLUTIONS, is_layer, outermost
from ast_plugin.slots import plain_name

STEM = "input stem"
OUTPUT = "output head"
TIED_OUTPUT = "output head, tied to the embedding by the configuration"
CLASSIFIER = "classifier head"

_FEW_CHANNELS = 4  # grey, RGB, and RGB with alpha or depth
_COLOURS = 3
_TEXT = re.compile(r"\w*(_ids|_tokens|_codes|embeds)")  # names of inputs that embeddings read
_PATCHES = re.compile(r"patch_?(embed|proj|conv)|embed_patch|tubelet")
_ATTENTION = re.compile(r"(^|[._])(att|attn|attention|self)([._]|$)|decoder")
_HEADS = re.compile(r"(?!.*(point|box)).*(class|head|score|qa_outputs|logit)")
_LAST_LAYERS = re.compile(r"(?!pre_)(\w+_)?classifier|score|qa_outputs|\w*logits\w*|(lm|ctc)_head")


def networks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Return the networks of Hugging Face in `model` by name, itself under "", without those that are part of another.

    Args:
        model: Any module.
    """
    return outermost(model, is_network)


def is_network(module: nn.Module) -> bool:
    """Return whether a module derives from transformers' ``PreTrainedModel``."""
    return any(
        kind.__name__ == "PreTrainedModel" and f"{kind.__module__}.".startswith("transformers.")
        for kind in type(module).__mro__
    )


def input_layers(network: nn.Module) -> list[nn.Module]:
    """Return the layers of a network that read images, sound or series of numbers: one for each part that does.

    They are the first convolution of a part, where it reads at most four channels or as many as the configuration
    says images have; layers that embed patches of them; and where there are none, the first layer of a network, or of
    a part of one that reads tokens itself.

    Args:
        network: The network; parts of it may be networks again, such as encoders.
    """
    parts = {name: module for name, module in network.named_modules() if is_network(module)}
    found = {name: _own_input_layers(part) for name, part in parts.items()}
    for name, part in parts.items():
        around = max((outer for outer in parts if not outer or name.startswith(f"{outer}.")), key=len, default="")
        inner = [layers for other, layers in found.items() if not name or f"{other}.".startswith(f"{name}.")]
        first = next(((path, layer) for path, layer in part.named_modules() if is_layer(layer)), None)
        if any(inner) or first is None or _reads_tokens(part) or (name and not _reads_tokens(parts[around])):
            continue
        if not _ATTENTION.search(first[0]):
            found[name] = [first[1]]
    return [layer for layers in found.values() for layer in layers]


def output_layers(network: nn.Module) -> dict[nn.Module, str]:
    """Return the layers of a network whose output is compared with the labels, and what they are called here.

    They are the output embeddings, also where they are not tied to the input's, and outside the base model the layers
    that have as many outputs as there are labels or tokens, or the name of a classifier.

    Args:
        network: The network; parts of it may be networks again, such as decoders.
    """
    found: dict[nn.Module, str] = {}
    for part in [module for module in network.modules() if is_network(module)]:
        found |= dict.fromkeys(_classifiers(part), CLASSIFIER)
        head = _embeddings(part, "get_output_embeddings")
        if head is not None:
            reason = TIED_OUTPUT if _tied_by_configuration(part, head) else OUTPUT
            found |= dict.fromkeys((layer for layer in head.modules() if is_layer(layer)), reason)
    return found


def _reads_tokens(part: nn.Module) -> bool:
    named = str(getattr(part, "main_input_name", "input_ids"))
    return "Decoder" in type(part).__name__ or bool(_TEXT.fullmatch(named))


def _own_input_layers(part: nn.Module) -> list[nn.Module]:
    layers = dict(_own_layers(part))
    channels = _numbers(part, "num_channels", "in_channels", "in_chans", "num_input_channels") or {_COLOURS}
    patch = max(_numbers(part, "patch_size"), default=1)
    first = next((layer for layer in layers.values() if isinstance(layer, CONVOLUTIONS)), None)
    found = []
    for name, layer in layers.items():
        inputs = _inputs(layer)
        if isinstance(layer, CONVOLUTIONS):
            reads = inputs <= _FEW_CHANNELS or inputs in channels
            stem = reads and (layer is first or bool(_PATCHES.search(name)))
        else:
            reads = any(inputs % (count * patch * patch) == 0 for count in channels if count > 0)
            stem = reads and bool(_PATCHES.search(name)) and patch > 1
        if stem:
            found.append(layer)
    return found


def _classifiers(part: nn.Module) -> list[nn.Module]:
    labels = _numbers(part, "num_labels")
    sizes = labels | _numbers(part, "vocab_size")
    base = part._modules.get(str(getattr(part, "base_model_prefix", "")))
    found = []
    for name, layer in _own_layers(part, without=base):
        child = name.partition(".")[0]
        if base is None and not _HEADS.match(child):
            continue
        # Where there is a label for "none of these", it is not counted in num_labels.
        none_of_these = "class" in name and _outputs(layer) - 1 in labels
        if _outputs(layer) in sizes or none_of_these or _LAST_LAYERS.fullmatch(name):
            found.append(layer)
    # A layer before the last may happen to be as wide as there are labels.
    return [layer for layer in found if layer is found[-1] or _outputs(layer) != _inputs(layer)]


def _own_layers(part: nn.Module, without: nn.Module | None = None) -> Iterator[tuple[str, nn.Module]]:
    """Yield the layers of a network by plain name, in order, without those of networks inside it."""
    for name, child in part.named_children():
        if child is without or is_network(child):
            continue
        if is_layer(child):
            yield plain_name(name), child
        for inner, layer in _own_layers(child, without):
            yield plain_name(f"{name}.{inner}"), layer


def _embeddings(part: nn.Module, method: str) -> nn.Module | None:
    try:
        found = getattr(part, method)()
    except Exception:  # by class NotImplementedError, AttributeError and more: a network without
        return None
    return found if isinstance(found, nn.Module) else None


def _tied_by_configuration(part: nn.Module, head: nn.Module) -> bool:
    """Return whether an output head that is a weight of its own now becomes the embedding's when it is loaded."""
    configs = _configs(part)
    told = [config.tie_word_embeddings for config in configs if hasattr(config, "tie_word_embeddings")]
    if not (told and all(told) and getattr(part, "_tied_weights_keys", None)):
        return False
    weight = getattr(_embeddings(part, "get_input_embeddings"), "weight", None)
    return weight is not None and getattr(head, "weight", None) is not weight


def _configs(part: nn.Module) -> Sequence[Any]:
    """Return the configuration of a network, and that of its text part where it has one."""
    config: Any = getattr(part, "config", None)
    text = getattr(config, "text_config", None)
    return [found for found in (config, text) if found is not None]


def _numbers(part: nn.Module, *names: str) -> set[int]:
    values = [getattr(config, name, None) for config in _configs(part) for name in names]
    return {value for value in values if isinstance(value, int)}


def _inputs(layer: nn.Module) -> int:
    return int(getattr(layer, "in_features", getattr(layer, "in_channels", getattr(layer, "nx", 0))))


def _outputs(layer: nn.Module) -> int:
    return int(getattr(layer, "out_features", getattr(layer, "out_channels", getattr(layer, "nf", 0))))
