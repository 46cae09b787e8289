"""The reference of the correction equals the dense one, whatever it is kept as."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ast_plugin import packs
from ast_plugin.correction import Correction, correct
from ast_plugin.gradients import GradientMasks
from ast_plugin.kept import KeptByMask, KeptByPosition
from ast_plugin.masks import MaskStore
from ast_plugin.packed_masks import PackedMasks
from ast_plugin.packs import MemoryOrder
from ast_plugin.reference import ComparedGradients, GradientReference, correct_pairs, correct_whole
from ast_plugin.slots import ParameterSlots

SHAPES: dict[str, tuple[int, ...]] = {"conv": (4, 3, 3, 3), "fc": (6, 8), "tiny": (1, 2)}
DENSITIES = {"all": 1.0, "half": 0.5, "few": 0.1, "fewer": 0.07, "none": 0.0}

Lay = Callable[[Tensor], Tensor]


def channels_last(tensor: Tensor) -> Tensor:
    return tensor.to(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor.clone()


def with_gaps(tensor: Tensor) -> Tensor:
    return tensor.repeat_interleave(2, dim=-1)[..., ::2]


LAYOUTS: dict[str, Lay] = {"contiguous": torch.clone, "channels_last": channels_last, "gaps": with_gaps}
EVERY_LAYOUT = pytest.mark.parametrize("lay", [pytest.param(lay, id=name) for name, lay in LAYOUTS.items()])


class Setting:
    """Some weights, the masks of some sub-nets, and what a step needs for the correction.

    Args:
        shapes: Of the weights, by name.
        densities: Of the sub-nets, by name; masks are random.
        lay: Gives weights and gradients a memory layout.
        dtype: Of the weights.
    """

    def __init__(
        self,
        shapes: dict[str, tuple[int, ...]] = SHAPES,
        densities: dict[str, float] = DENSITIES,
        lay: Lay = torch.clone,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.model, self.shapes, self.lay, self.dtype = nn.Module(), shapes, lay, dtype
        for name, shape in shapes.items():
            self.model.register_parameter(name, nn.Parameter(lay(torch.zeros(shape, dtype=dtype))))
        self.parameters = ParameterSlots(self.model, shapes)
        self.masks = MaskStore(tuple(densities), shapes)
        for sub_net, density in densities.items():
            for name in shapes:
                self.draw_mask(sub_net, name, density)
        self.packed = PackedMasks(self.parameters, self.masks)
        self.gradients = GradientMasks(self.parameters, self.masks, self.packed)
        self.reference = GradientReference(self.packed, self.gradients)

    def draw_mask(self, sub_net: str, name: str, density: float) -> None:
        """Keep exactly that share, rounded down."""
        mask = torch.zeros(self.shapes[name], dtype=torch.bool)
        mask.view(-1)[torch.randperm(mask.numel())[: int(density * mask.numel())]] = True
        self.masks.set(sub_net, name, mask)

    def backward(self, sub_net: str, without: Sequence[str] = ()) -> dict[str, Tensor]:
        """Leave random gradients of a sub-net, and return them masked, as an ordinary computation finds them."""
        expected = {}
        self.gradients.end()
        for name, parameter in self.parameters.items():
            dense = torch.randn(self.shapes[name]).to(parameter.dtype)
            parameter.grad = None if name in without else self.lay(dense)
            if name not in without:
                expected[name] = dense * self.masks.get(sub_net, name)
        self.gradients.mask(sub_net)
        return expected

    def present(self) -> dict[str, Tensor]:
        return {name: p.grad.clone() for name, p in self.parameters.items() if p.grad is not None}

    def compared(self, sub_net: str) -> dict[str, Tensor]:
        """Return the references that `pairs` gives, as whole tensors, and check the gradients beside them."""
        found = {}
        for pair in self.reference.pairs(sub_net):
            layout = pair.pack.order(pair.gradients)
            references = whole(pair, pair.reference, layout)
            gradients = whole(pair, pair.values, layout)
            for name, reference, gradient, both in zip(pair.pack.names, references, gradients, pair.both, strict=True):
                now = self.parameters[name].grad
                assert torch.equal(gradient, torch.zeros(self.shapes[name]) if now is None else now)
                if both:
                    found[name] = reference
        return found


def whole(pair: ComparedGradients, values: Tensor, layout: MemoryOrder) -> list[Tensor]:
    vector = torch.zeros(pair.pack.total, dtype=values.dtype)
    pair.kept.write(values.clone(), vector)
    return pair.pack.tensors(vector, layout)


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def restricted(setting: Setting, gradients: dict[str, Tensor], sub_net: str) -> dict[str, Tensor]:
    return {name: gradient * setting.masks.get(sub_net, name) for name, gradient in gradients.items()}


@pytest.fixture(params=["together", "alone"])
def arrangement(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a test with all tensors in one pack, and with a pack each."""
    if request.param == "alone":
        monkeypatch.setattr(packs, "_SMALL", 1)
    return request.param


BY_LAYER = functools.partial(correct, scope="layer")


def by_layer(*, gradients: list[Tensor], references: list[Tensor], names: list[str]) -> Correction:
    return BY_LAYER(gradients, references)


def hand_worked() -> Setting:
    """One weight of 2 x 2; a keeps all of it, b the diagonal, c all but the last."""
    setting = Setting({"w": (2, 2)}, {"a": 1.0, "b": 1.0, "c": 1.0})
    setting.masks.set("b", "w", torch.eye(2, dtype=torch.bool))
    setting.masks.set("c", "w", torch.tensor([[True, True], [True, False]]))
    return setting


@pytest.mark.parametrize("coming", ["b", None])
def test_a_hand_worked_correction(coming: str | None) -> None:
    setting = hand_worked()
    setting.model.w.grad = torch.tensor([[-2.0, 5.0], [7.0, 0.0]])
    setting.gradients.mask("a")
    setting.reference.take("a", coming)
    setting.gradients.end()
    setting.model.w.grad = torch.tensor([[1.0, 8.0], [9.0, 1.0]])
    setting.gradients.mask("b")
    # g = (1, 1) and r = (-2, 0) on the diagonal: <g, r> = -2, <r, r> = 4, g + r / 2 = (0, 1).
    (pair,) = setting.reference.pairs("b")
    assert setting.compared("b")["w"].tolist() == [[-2, 0], [0, 0]]
    found = correct_pairs([pair], by_layer)
    assert found is not None
    assert (found.checks, found.conflicts) == (1, 1)
    assert found.cosines == pytest.approx([-(0.5**0.5)])
    assert setting.model.w.grad.tolist() == [[0, 0], [0, 1]]


def test_a_new_reference_is_none() -> None:
    setting = hand_worked()
    assert setting.reference.sub_net is None
    assert not any(setting.reference.serves(name) for name in "abc")
    assert setting.reference.state_dict() == {"sub_net": None, "coming": None, "gradients": {}}
    setting.backward("b")
    assert setting.reference.pairs("b") == []


def test_a_reference_serves_other_sub_nets_and_only_the_one_it_was_taken_for() -> None:
    setting = hand_worked()
    setting.backward("a")
    setting.reference.take("a", None)
    assert [setting.reference.serves(name) for name in "abc"] == [False, True, True]
    setting.reference.take("a", "b")
    assert [setting.reference.serves(name) for name in "abc"] == [False, True, False]
    setting.reference.take("a", "a")  # the same sub-net goes on
    assert [setting.reference.serves(name) for name in "abc"] == [False, False, False]
    setting.reference.take("b", "a")
    assert [setting.reference.serves(name) for name in "abc"] == [True, False, False]
    setting.reference.forget()
    assert not any(setting.reference.serves(name) for name in "abc")
    assert setting.reference.state_dict() == {"sub_net": None, "coming": None, "gradients": {}}
    assert setting.reference.pairs("b") == []


@pytest.mark.usefixtures("arrangement")
@EVERY_LAYOUT
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("sub_net", DENSITIES)
@pytest.mark.parametrize("coming", DENSITIES)
def test_the_reference_is_the_earlier_gradient_within_the_masks(
    sub_net: str, coming: str, known: bool, lay: Lay
) -> None:
    setting = Setting(lay=lay)
    earlier = setting.backward(sub_net)
    setting.reference.take(sub_net, coming if known else None)
    setting.backward(coming)
    assert_equal(setting.compared(coming), restricted(setting, earlier, coming))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("coming", ["fewer", None])
def test_the_reference_has_its_gradients_dtype(dtype: torch.dtype, coming: str | None) -> None:
    setting = Setting(dtype=dtype)
    earlier = setting.backward("few")
    setting.reference.take("few", coming)
    now = setting.backward("fewer")
    (pair,) = setting.reference.pairs("fewer")
    assert pair.reference.dtype == pair.values.dtype == dtype
    layout = pair.pack.order(pair.gradients)
    assert_equal(
        dict(zip(SHAPES, whole(pair, pair.reference, layout), strict=True)), restricted(setting, earlier, "fewer")
    )
    assert_equal(dict(zip(SHAPES, whole(pair, pair.values, layout), strict=True)), now)


@pytest.mark.usefixtures("arrangement")
@pytest.mark.parametrize("sub_net", ["few", "half", "all"])
def test_the_reference_is_a_copy(sub_net: str) -> None:
    setting = Setting()
    for coming in ("fewer", "half", None):
        earlier = setting.backward(sub_net)
        setting.reference.take(sub_net, coming)
        for parameter in setting.parameters.values():
            parameter.grad.fill_(7)
        setting.backward(coming or "fewer")
        assert_equal(setting.compared(coming or "fewer"), restricted(setting, earlier, coming or "fewer"))


def test_a_reference_taken_for_the_coming_masks_is_compared_as_it_is() -> None:
    setting = Setting()
    earlier = setting.backward("few")
    setting.reference.take("few", "fewer")
    setting.backward("fewer")
    (pair,), (again,) = setting.reference.pairs("fewer"), setting.reference.pairs("fewer")
    assert pair.reference is again.reference
    assert pair.reference.numel() == setting.masks.kept("fewer")
    assert_equal(setting.compared("fewer"), restricted(setting, earlier, "fewer"))


@pytest.mark.usefixtures("arrangement")
@pytest.mark.parametrize("sub_net", ["few", "half"])
@pytest.mark.parametrize("coming", ["fewer", "half"])
def test_gradients_that_were_clipped_after_masking_are_taken_as_they_are(sub_net: str, coming: str) -> None:
    setting = Setting()
    earlier = setting.backward(sub_net)
    for parameter in setting.parameters.values():
        parameter.grad.mul_(0.25)
    setting.reference.take(sub_net, coming)
    setting.backward(coming)
    expected = restricted(setting, {name: 0.25 * g for name, g in earlier.items()}, coming)
    assert_equal(setting.compared(coming), expected)


@pytest.mark.usefixtures("arrangement")
@pytest.mark.parametrize("sub_net", ["all", "half", "few"])
@pytest.mark.parametrize("coming", ["fewer", "half"])
@pytest.mark.parametrize("density", [0.03, 0.6])
def test_masks_that_changed_after_all_find_what_was_taken_for_the_old_ones(
    sub_net: str, coming: str, density: float
) -> None:
    setting = Setting()
    earlier = setting.backward(sub_net)
    setting.reference.take(sub_net, coming)
    taken = restricted(setting, earlier, coming)
    for name in ("conv", "fc"):
        setting.draw_mask(coming, name, density)
    setting.backward(coming)
    # Outside the old masks nothing was remembered; what is there is right, and within the new masks.
    assert_equal(setting.compared(coming), restricted(setting, taken, coming))


@pytest.mark.usefixtures("arrangement")
@pytest.mark.parametrize("density", [0.03, 0.6])
def test_a_whole_reference_is_right_for_masks_that_changed(density: float) -> None:
    setting = Setting()
    earlier = setting.backward("half")
    setting.reference.take("half", None)
    for name in ("conv", "fc"):
        setting.draw_mask("few", name, density)
    setting.backward("few")
    assert_equal(setting.compared("few"), restricted(setting, earlier, "few"))


@pytest.mark.usefixtures("arrangement")
@pytest.mark.parametrize("sub_net", ["few", "half"])
@pytest.mark.parametrize("coming", ["fewer", "half", "all", None])
@pytest.mark.parametrize(
    ("earlier_without", "later_without", "both"),
    [
        (["conv"], [], ["fc", "tiny"]),
        ([], ["fc"], ["conv", "tiny"]),
        (["conv"], ["fc"], ["tiny"]),
        (["conv", "fc"], ["tiny"], []),
        (["conv", "fc", "tiny"], [], []),
        ([], ["conv", "fc", "tiny"], []),
    ],
)
def test_a_parameter_needs_a_gradient_on_both_sides(
    sub_net: str, coming: str | None, earlier_without: list[str], later_without: list[str], both: list[str]
) -> None:
    setting = Setting()
    now = coming or "fewer"
    earlier = setting.backward(sub_net, earlier_without)
    setting.reference.take(sub_net, coming)
    expected = setting.backward(now, later_without)
    assert_equal(setting.compared(now), restricted(setting, {name: earlier[name] for name in both}, now))
    seen = []

    def halve(*, gradients: list[Tensor], references: list[Tensor], names: list[str]) -> Correction:
        seen.extend(names)
        for gradient in gradients:
            gradient.mul_(0.5)
        return Correction()

    correct_pairs(setting.reference.pairs(now), halve)
    assert sorted(seen) == sorted(both)
    assert_equal(setting.present(), {name: g * (0.5 if name in both else 1) for name, g in expected.items()})
    seen.clear()
    correct_whole(setting.reference.pairs(now), halve)
    assert sorted(seen) == sorted(both)
    assert_equal(setting.present(), {name: g * (0.25 if name in both else 1) for name, g in expected.items()})


@pytest.mark.usefixtures("arrangement")
@pytest.mark.parametrize("lay", [torch.clone, channels_last])
@pytest.mark.parametrize("write_back", [correct_pairs, correct_whole])
@pytest.mark.parametrize("sub_net", ["all", "half", "few"])
def test_corrected_values_reach_the_gradients(sub_net: str, write_back: Any, lay: Lay) -> None:
    assert_scaled(Setting(lay=lay), sub_net, write_back)


@pytest.mark.parametrize(
    ("arrangement", "sub_net", "write_back"),
    [
        ("together", "half", correct_pairs),
        ("alone", "few", correct_pairs),
        ("alone", "half", correct_pairs),
        ("alone", "all", correct_pairs),
        ("alone", "half", correct_whole),
    ],
    indirect=["arrangement"],
)
def test_corrected_values_reach_gradients_with_gaps(arrangement: str, sub_net: str, write_back: Any) -> None:
    assert_scaled(Setting(lay=with_gaps), sub_net, write_back)


def assert_scaled(setting: Setting, sub_net: str, write_back: Any) -> None:
    setting.backward("fewer")
    setting.reference.take("fewer", None)
    before = setting.backward(sub_net)
    tensors = {name: p.grad for name, p in setting.parameters.items()}

    def scale(*, gradients: list[Tensor], references: list[Tensor], names: list[str]) -> Correction:
        for i, gradient in enumerate(gradients):
            gradient.mul_(2.0**i)
        return Correction(checks=len(names))

    found = write_back(setting.reference.pairs(sub_net), scale)
    assert found == Correction(checks=3)
    assert_equal(setting.present(), {name: g * 2.0**i for i, (name, g) in enumerate(before.items())})
    assert all(parameter.grad is tensors[name] for name, parameter in setting.parameters.items())


@pytest.mark.usefixtures("arrangement")
@pytest.mark.parametrize("sub_net", ["all", "half", "few"])
def test_without_a_conflict_gradients_are_not_touched(sub_net: str) -> None:
    setting = Setting()
    setting.backward("fewer")
    setting.reference.take("fewer", sub_net)
    setting.backward(sub_net)
    versions = [p.grad._version for p in setting.parameters.values()]

    def look(*, gradients: list[Tensor], references: list[Tensor], names: list[str]) -> None:
        assert names == list(SHAPES)

    assert correct_pairs(setting.reference.pairs(sub_net), look) is None
    assert [p.grad._version for p in setting.parameters.values()] == versions


@pytest.mark.usefixtures("arrangement")
def test_plugins_see_whole_gradients_and_references_of_their_shapes() -> None:
    setting = Setting(lay=channels_last)
    earlier = setting.backward("half")
    setting.reference.take("half", None)
    now = setting.backward("few")
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def look(*, gradients: list[Tensor], references: list[Tensor], names: list[str]) -> None:
        seen.update(zip(names, zip(gradients, references, strict=True), strict=True))

    correct_whole(setting.reference.pairs("few"), look)
    assert all(gradient is setting.parameters[name].grad for name, (gradient, _) in seen.items())
    assert_equal({name: gradient for name, (gradient, _) in seen.items()}, now)
    assert_equal({name: reference for name, (_, reference) in seen.items()}, restricted(setting, earlier, "few"))


@pytest.mark.usefixtures("arrangement")
def test_the_default_correction_sees_vectors_of_the_kept_weights() -> None:
    setting = Setting()
    setting.backward("half")
    setting.reference.take("half", "few")
    now = setting.backward("few")
    seen: dict[str, Tensor] = {}

    def look(*, gradients: list[Tensor], references: list[Tensor], names: list[str]) -> None:
        assert [g.shape for g in gradients] == [r.shape for r in references]
        seen.update(zip(names, gradients, strict=True))

    correct_pairs(setting.reference.pairs("few"), look)
    assert_equal(seen, {name: gradient[setting.masks.get("few", name)] for name, gradient in now.items()})


def test_nothing_to_compare_is_still_one_call() -> None:
    for write_back in (correct_pairs, correct_whole):
        assert write_back([], by_layer) == Correction()


@pytest.mark.usefixtures("arrangement")
@pytest.mark.parametrize("write_back", [correct_pairs, correct_whole])
@pytest.mark.parametrize("sub_net", ["half", "few"])
def test_a_correction_does_not_change_the_next_reference(sub_net: str, write_back: Any) -> None:
    setting = Setting()
    earlier = setting.backward("all")
    setting.reference.take("all", None)
    before = setting.backward(sub_net)
    for parameter, gradient in zip(setting.parameters.values(), earlier.values(), strict=True):
        parameter.grad.sub_(gradient * parameter.grad.bool())  # opposed for certain
    before = setting.present()
    pairs = setting.reference.pairs(sub_net)
    setting.reference.take(sub_net, "fewer")
    found = write_back(pairs, by_layer)
    assert found.conflicts
    setting.backward("fewer")
    assert_equal(setting.compared("fewer"), restricted(setting, before, "fewer"))


@pytest.mark.usefixtures("arrangement")
def test_values_at_hand_are_right_after_a_correction() -> None:
    setting = Setting()
    setting.backward("all")
    setting.reference.take("all", "few")
    setting.backward("few")

    def negate(*, gradients: list[Tensor], references: list[Tensor], names: list[str]) -> None:
        for gradient in gradients[::2]:
            gradient.neg_()

    correct_pairs(setting.reference.pairs("few"), negate)
    corrected = setting.present()
    setting.reference.take("few", "half")
    setting.backward("half")
    assert_equal(setting.compared("half"), restricted(setting, corrected, "half"))


@pytest.mark.usefixtures("arrangement")
@pytest.mark.parametrize("coming", ["half", "few", None])
@pytest.mark.parametrize(
    "lays", [(torch.clone, channels_last), (channels_last, torch.clone), (with_gaps, channels_last)]
)
def test_gradients_may_lie_otherwise_in_the_next_step(coming: str | None, lays: tuple[Lay, Lay]) -> None:
    setting = Setting()
    setting.lay = lays[0]
    earlier = setting.backward("all")
    setting.reference.take("all", coming)
    setting.lay = lays[1]
    now = coming or "few"
    setting.backward(now)
    assert_equal(setting.compared(now), restricted(setting, earlier, now))


@pytest.mark.usefixtures("arrangement")
@pytest.mark.parametrize("coming", ["half", "few", None])
@pytest.mark.parametrize("converted", [tuple(SHAPES), ("fc",)], ids=["whole model", "one layer"])
def test_the_reference_follows_a_model_that_is_converted(coming: str | None, converted: tuple[str, ...]) -> None:
    setting = Setting()
    earlier = setting.backward("all")
    setting.reference.take("all", coming)
    for name in converted:
        setting.parameters[name].data = setting.parameters[name].data.double()
        setting.parameters[name].grad = None
    setting.packed.refresh()
    now = coming or "few"
    gradients = setting.backward(now)
    expected = restricted(setting, earlier, now)
    for saved in (False, True):  # as the next step finds it, and as a checkpoint would hold it
        pairs = setting.reference.pairs(now)
        found = {}
        for pair in pairs:
            references = whole(pair, pair.reference, pair.pack.order(pair.gradients))
            found |= dict(zip(pair.pack.names, references, strict=True))
        assert {name: tensor.dtype for name, tensor in found.items()} == {
            name: torch.float64 if name in converted else torch.float32 for name in SHAPES
        }
        assert_equal({name: tensor.float() for name, tensor in found.items()}, expected)
        if not saved:
            setting.reference.load_state_dict(setting.reference.state_dict())
    assert gradients.keys() == found.keys()


def test_a_reference_of_a_converted_model_is_saved_before_its_next_step() -> None:
    setting = Setting()
    earlier = setting.backward("all")
    setting.reference.take("all", "half")
    setting.model.double()
    state = setting.reference.state_dict()  # nobody has put a sub-net on since
    assert {tensor.dtype for tensor in state["gradients"].values()} == {torch.float64}
    for name, tensor in state["gradients"].items():
        assert torch.equal(tensor, earlier[name][setting.masks.get("half", name)].double())


def saved_and_loaded(setting: Setting, target: Setting) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(setting.reference.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    target.reference.load_state_dict(state)
    return state


def twin(setting: Setting) -> Setting:
    """Return new weights of the same kind with the same masks."""
    other = Setting(setting.shapes, dict.fromkeys(setting.masks.sub_nets, 1.0), setting.lay, setting.dtype)
    for sub_net in setting.masks.sub_nets:
        other.masks.unpack(sub_net, setting.masks.pack(sub_net))
    return other


@pytest.mark.usefixtures("arrangement")
@EVERY_LAYOUT
@pytest.mark.parametrize("sub_net", ["half", "few"])
@pytest.mark.parametrize("coming", ["fewer", "half", "all", "none", None])
@pytest.mark.parametrize("without", [[], ["conv"], ["conv", "fc"]])
def test_a_saved_reference_goes_on_elsewhere(sub_net: str, coming: str | None, without: list[str], lay: Lay) -> None:
    setting = Setting(lay=lay)
    if lay is with_gaps:
        # Backward gives gaps to no gradient: whatever the weights look like, gradients of such weights are row-major.
        setting.lay = torch.clone
    earlier = setting.backward(sub_net, without)
    setting.reference.take(sub_net, coming)
    other = twin(setting)
    state = saved_and_loaded(setting, other)
    assert (other.reference.sub_net, other.reference.coming) == (sub_net, coming)
    assert list(state["gradients"]) == [name for name in SHAPES if name not in without]
    for name, saved in state["gradients"].items():
        mask = setting.masks.get(coming, name) if coming else None
        assert torch.equal(saved, earlier[name] if mask is None else earlier[name][mask])
    now = coming or "fewer"
    torch.manual_seed(5)
    setting.backward(now)
    torch.manual_seed(5)
    other.backward(now)
    assert_equal(other.compared(now), setting.compared(now))
    assert_equal(other.compared(now), restricted(setting, earlier, now))
    assert_equal(other.reference.state_dict()["gradients"], setting.reference.state_dict()["gradients"])


@pytest.mark.parametrize("arrangement", ["alone"], indirect=True)
@pytest.mark.parametrize("coming", ["half", "few", None])
def test_a_saved_reference_serves_gradients_that_do_not_lie_as_their_parameters_do(
    arrangement: str, coming: str | None
) -> None:
    # torch.autograd.grad, and an assignment to ``grad``, take the order that the kernel has made.
    setting = Setting()
    setting.lay = channels_last
    earlier = setting.backward("all")
    setting.reference.take("all", coming)
    now = coming or "few"
    setting.backward(now)
    assert_equal(setting.compared(now), restricted(setting, earlier, now))
    saved_and_loaded(setting, setting)
    assert_equal(setting.compared(now), restricted(setting, earlier, now))


@pytest.mark.usefixtures("arrangement")
def test_a_saved_reference_is_a_copy() -> None:
    setting = Setting()
    for coming in ("few", "half", None):
        earlier = setting.backward("half")
        setting.reference.take("half", coming)
        state = setting.reference.state_dict()
        other = twin(setting)
        other.reference.load_state_dict(state)
        for gradient in state["gradients"].values():
            gradient.fill_(7)
        for each in (setting, other):
            each.backward(coming or "few")
            assert_equal(each.compared(coming or "few"), restricted(setting, earlier, coming or "few"))


def test_a_restricted_reference_is_saved_by_the_kept_weights_alone() -> None:
    setting = Setting()
    setting.backward("half")
    setting.reference.take("half", "few")
    state = setting.reference.state_dict()
    sizes = {name: tuple(saved.shape) for name, saved in state["gradients"].items()}
    assert sizes == {name: (setting.masks.kept("few", name),) for name in SHAPES}


@pytest.mark.usefixtures("arrangement")
@pytest.mark.parametrize("density", [0.03, 0.6])
def test_a_reference_saved_after_its_masks_changed_is_for_the_new_ones(density: float) -> None:
    setting = Setting()
    earlier = setting.backward("half")
    setting.reference.take("half", "few")
    taken = restricted(setting, earlier, "few")
    for name in ("conv", "fc"):
        setting.draw_mask("few", name, density)
    other = twin(setting)
    saved_and_loaded(setting, other)
    other.backward("few")
    assert_equal(other.compared("few"), restricted(setting, taken, "few"))


@pytest.mark.usefixtures("arrangement")
@pytest.mark.parametrize("coming", ["few", "half", None])
def test_a_restricted_reference_can_be_saved_whole(coming: str | None) -> None:
    setting = Setting(lay=channels_last)
    earlier = setting.backward("all")
    setting.reference.take("all", coming)
    state = setting.reference.state_dict(whole=True)
    assert (state["sub_net"], state["coming"]) == ("all", None)
    assert_equal(state["gradients"], restricted(setting, earlier, coming) if coming else earlier)
    other = twin(setting)
    other.reference.load_state_dict(state)
    now = coming or "few"
    assert other.reference.serves(now)
    other.backward(now)
    assert_equal(other.compared(now), restricted(setting, earlier, now))


def test_loading_replaces_what_was_remembered() -> None:
    setting = Setting()
    empty = setting.reference.state_dict()
    setting.backward("half")
    setting.reference.take("half", "few")
    setting.reference.load_state_dict(empty)
    assert setting.reference.state_dict() == empty
    setting.backward("few")
    assert setting.reference.pairs("few") == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_reference_keeps_its_dtype_through_a_file(dtype: torch.dtype) -> None:
    setting = Setting(dtype=dtype)
    setting.backward("half")
    setting.reference.take("half", "few")
    state = saved_and_loaded(setting, twin(setting))
    assert {saved.dtype for saved in state["gradients"].values()} == {dtype}
    # Also where it is not the weights'.
    other = twin(Setting())
    other.reference.load_state_dict(state)
    assert_equal(other.reference.state_dict()["gradients"], state["gradients"])


@pytest.mark.usefixtures("arrangement")
@pytest.mark.parametrize("coming", ["few", "half", None])
def test_saved_gradients_take_no_more_room_than_they_need(coming: str | None) -> None:
    setting = Setting()
    setting.backward("half")
    setting.reference.take("half", coming)
    for saved in setting.reference.state_dict()["gradients"].values():
        assert saved.untyped_storage().nbytes() == saved.nbytes


def test_the_sub_nets_of_these_tests_are_of_every_form() -> None:
    setting = Setting()
    setting.backward("all")
    (pack,) = setting.packed.packs
    forms = {name: setting.packed.kept(name, pack, setting.packed.gradients(pack)) for name in setting.masks.sub_nets}
    assert isinstance(forms["all"], KeptByMask)
    assert forms["all"].everything
    assert isinstance(forms["half"], KeptByMask)
    assert not forms["half"].everything
    assert all(isinstance(forms[name], KeptByPosition) for name in ("few", "fewer", "none"))


@settings(max_examples=80)
@given(
    seed=st.integers(0, 10_000),
    shapes=st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=4), min_size=1, max_size=5),
    densities=st.lists(st.sampled_from([0.0, 0.05, 0.1, 0.125, 0.3, 0.8, 1.0]), min_size=2, max_size=3),
    scope=st.sampled_from(["layer", "global"]),
    small=st.sampled_from([1, 20, 1 << 16]),
    full=st.sampled_from([60, 1 << 20]),
    layout=st.sampled_from(["contiguous", "channels_last"]),
    known=st.lists(st.sampled_from(["known", "unknown", "saved"]), min_size=4, max_size=4),
    whole_ones=st.booleans(),
)
def test_a_run_through_packs_equals_a_dense_run(
    seed: int,
    shapes: list[list[int]],
    densities: list[float],
    scope: str,
    small: int,
    full: int,
    layout: str,
    known: list[str],
    whole_ones: bool,
) -> None:
    torch.manual_seed(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packs, "_SMALL", small)
        patch.setattr(packs, "_PACK", full)
        setting = Setting(
            {f"p{i}": tuple(shape) for i, shape in enumerate(shapes)},
            {f"s{i}": density for i, density in enumerate(densities)},
            LAYOUTS[layout],
            torch.float64,
        )
        names = setting.masks.sub_nets
        earlier: dict[str, Tensor] = {}
        for step, how in enumerate(known):
            sub_net, coming = names[step % len(names)], names[(step + 1) % len(names)]
            gone = [name for name in setting.shapes if torch.rand(()) < 0.1]
            now = setting.backward(sub_net, gone)
            both = [name for name in now if name in earlier]
            expected = {name: g.clone() for name, g in now.items()}
            references = restricted(setting, {name: earlier[name] for name in both}, sub_net)
            wanted = correct([expected[n] for n in both], [references[n] for n in both], scope=scope)

            pairs = setting.reference.pairs(sub_net) if setting.reference.serves(sub_net) else []
            setting.reference.take(sub_net, None if how == "unknown" else coming)
            if how == "saved":
                saved_and_loaded(setting, setting)
            found = (correct_whole if whole_ones else correct_pairs)(
                pairs, lambda gradients, references, names: correct(gradients, references, scope=scope)
            )
            assert found is not None
            assert (found.checks, found.conflicts) == (wanted.checks, wanted.conflicts)
            assert sorted(found.cosines) == pytest.approx(sorted(wanted.cosines), abs=1e-9)
            present = setting.present()
            assert present.keys() == expected.keys()
            for name, gradient in expected.items():
                assert torch.allclose(present[name], gradient, rtol=1e-9, atol=1e-9)
                assert not present[name][~setting.masks.get(sub_net, name)].any()
            earlier = now
