"""Gradient correction: small vectors worked by hand, then invariants over shapes, layouts and dtypes."""

from __future__ import annotations

import math

import pytest
import torch

from ast_plugin.correction import Correction, correct
from ast_plugin.errors import ConfigError


def cosine(gradient, reference):
    g, r = gradient.double().flatten(), reference.double().flatten()
    return float(torch.dot(g, r) / (g.norm() * r.norm()))


def opposed(shape, generator, dtype=torch.float32):
    """Return a gradient and a reference that point away from each other."""
    gradient = torch.randn(shape, generator=generator)
    reference = torch.randn(shape, generator=generator) - 0.7 * gradient
    return gradient.to(dtype), reference.to(dtype)


def test_opposed_gradient_by_hand():
    # <g, r> = 1*(-2) + 1*0 = -2, <r, r> = 4: g - (-2/4) r = (1, 1) + 0.5 * (-2, 0) = (0, 1). cos = -2 / (sqrt 2 * 2).
    gradient, reference = torch.tensor([1.0, 1.0]), torch.tensor([-2.0, 0.0])
    found = correct([gradient], [reference], scope="layer")
    assert gradient.tolist() == [0.0, 1.0]
    assert reference.tolist() == [-2.0, 0.0]
    assert (found.checks, found.conflicts) == (1, 1)
    assert found.cosines == pytest.approx([-math.sqrt(0.5)])


def test_agreeing_and_orthogonal_gradients_stay():
    gradients = [torch.tensor([1.0, 2.0]), torch.tensor([1.0, 0.0])]
    found = correct(gradients, [torch.tensor([3.0, 1.0]), torch.tensor([0.0, 5.0])], scope="layer")
    assert [g.tolist() for g in gradients] == [[1.0, 2.0], [1.0, 0.0]]
    # cos = 5 / (sqrt 5 * sqrt 10) = sqrt(1/2), and 0: no conflict.
    assert (found.checks, found.conflicts) == (2, 0)
    assert found.cosines == pytest.approx([math.sqrt(0.5), 0.0])


def test_layers_are_judged_one_by_one():
    # Layer 0 conflicts (-4), layer 1 agrees (+9).
    gradients = [torch.tensor([2.0, 1.0]), torch.tensor([3.0])]
    found = correct(gradients, [torch.tensor([-2.0, 0.0]), torch.tensor([3.0])], scope="layer")
    assert [g.tolist() for g in gradients] == [[0.0, 1.0], [3.0]]
    assert (found.checks, found.conflicts) == (2, 1)


def test_global_scope_judges_all_layers_as_one_vector():
    # <g, r> = -4 + 9 = 5 in all: no conflict, so nothing moves.
    gradients = [torch.tensor([2.0, 1.0]), torch.tensor([3.0])]
    found = correct(gradients, [torch.tensor([-2.0, 0.0]), torch.tensor([3.0])], scope="global")
    assert [g.tolist() for g in gradients] == [[2.0, 1.0], [3.0]]
    # |g|^2 = 14, |r|^2 = 13.
    assert (found.checks, found.conflicts) == (1, 0)
    assert found.cosines == pytest.approx([5 / math.sqrt(14 * 13)])


def test_global_scope_projects_all_layers_with_one_coefficient():
    # <g, r> = -4 + 2 = -2, <r, r> = 4 + 4 = 8: coefficient -1/4. (2 - 2/4, 1) and 1 + 2/4; the sum is 0 again.
    gradients = [torch.tensor([2.0, 1.0]), torch.tensor([1.0])]
    found = correct(gradients, [torch.tensor([-2.0, 0.0]), torch.tensor([2.0])], scope="global")
    assert [g.tolist() for g in gradients] == [[1.5, 1.0], [1.5]]
    assert (found.checks, found.conflicts, len(found.cosines)) == (1, 1, 1)


SHAPES = [(7,), (5, 3), (8, 4, 3, 3), (16, 1, 3, 3), (2, 3, 4, 5, 6), ()]


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_opposed_in_orthogonal_out(scope, dtype):
    generator = torch.Generator().manual_seed(1)
    pairs = [opposed(shape, generator, dtype) for shape in SHAPES if shape]
    gradients, references = [g for g, _ in pairs], [r for _, r in pairs]
    before = [r.clone() for r in references]
    found = correct(gradients, references, scope=scope)
    assert found.conflicts == found.checks == (len(pairs) if scope == "layer" else 1)
    # What is left is the rounding of the stored result.
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}[dtype]
    if scope == "layer":
        assert max(abs(cosine(g, r)) for g, r in zip(gradients, references, strict=True)) < tolerance
    else:
        flat = [torch.cat([t.flatten() for t in tensors]) for tensors in (gradients, references)]
        assert abs(cosine(*flat)) < tolerance
    assert all(torch.equal(r, b) and g.dtype == dtype for g, r, b in zip(gradients, references, before, strict=True))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_agreeing_gradients_are_untouched_bit_for_bit(shape, scope):
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    before, version = gradient.clone(), gradient._version
    found = correct([gradient], [gradient + 0.1 * gradient], scope=scope)
    assert torch.equal(gradient, before)
    assert gradient._version == version
    assert (found.checks, found.conflicts) == (1, 0)


def layouts(values):
    """Yield tensors equal to `values` (out, in, h, w) with different memory layouts."""
    yield values.clone()
    yield values.to(memory_format=torch.channels_last)
    yield values.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    wide = torch.empty(*values.shape[:3], 2 * values.shape[3])
    wide[..., ::2] = values
    yield wide[..., ::2]


def test_memory_layout_makes_no_difference():
    gradient, reference = opposed((6, 5, 3, 3), torch.Generator().manual_seed(3))
    expected = gradient.clone()
    correct([expected], [reference.clone()], scope="layer")
    for g in layouts(gradient):
        for r in layouts(reference):
            mine, strides = g.clone(memory_format=torch.preserve_format), g.stride()
            found = correct([g], [r], scope="layer")
            assert g.stride() == strides
            assert found.conflicts == 1
            assert torch.allclose(g, expected, atol=1e-6)
            g.copy_(mine)


def test_support_never_leaves_the_mask():
    generator = torch.Generator().manual_seed(4)
    gradient, reference = opposed((40, 30), generator)
    mask = torch.rand((40, 30), generator=generator) < 0.2
    gradient, reference = gradient * mask, reference * mask
    correct([gradient], [reference], scope="layer")
    assert not gradient[~mask].any()
    assert abs(cosine(gradient, reference)) < 1e-6


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize(
    ("gradient", "reference"),
    [
        ([0.0, 0.0], [1.0, 1.0]),
        ([1.0, -1.0], [0.0, 0.0]),
        ([math.nan, 1.0], [-1.0, -1.0]),
        ([1.0, 1.0], [-math.inf, 0]),
    ],
    ids=["zero gradient", "zero reference", "NaN gradient", "infinite reference"],
)
def test_what_cannot_be_judged_is_left_alone_and_not_counted(scope, gradient, reference):
    g = torch.tensor(gradient)
    found = correct([g], [torch.tensor(reference)], scope=scope)
    assert found == Correction(checks=0, conflicts=0, cosines=[])
    assert torch.allclose(g, torch.tensor(gradient), equal_nan=True, rtol=0, atol=0)


def test_a_broken_layer_does_not_stop_the_others_per_layer_but_stops_the_global_check():
    def gradients():
        return [torch.tensor([1.0, math.nan]), torch.tensor([1.0, 1.0])]

    references = [torch.tensor([-1.0, -1.0]), torch.tensor([-2.0, 0.0])]
    by_layer, as_one = gradients(), gradients()
    assert correct(by_layer, references, scope="layer").checks == 1
    assert by_layer[1].tolist() == [0.0, 1.0]
    assert correct(as_one, references, scope="global").checks == 0
    assert as_one[1].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1e22, 1e30])
def test_squares_that_float32_cannot_hold_are_still_judged(scale):
    gradient, reference = opposed((50,), torch.Generator().manual_seed(5))
    g, r = gradient * scale, reference * scale
    found = correct([g], [r], scope="layer")
    assert found.conflicts == 1
    assert found.cosines == pytest.approx([cosine(gradient, reference)], abs=1e-6)
    assert abs(cosine(g, r)) < 1e-5


def test_mixed_dtypes_go_together():
    generator = torch.Generator().manual_seed(6)
    pairs = [opposed((20,), generator, dtype) for dtype in (torch.float16, torch.float32, torch.float64)]
    gradients, references = [g for g, _ in pairs], [r.float() for _, r in pairs]
    assert correct(gradients, references, scope="layer").conflicts == 3
    assert [g.dtype for g in gradients] == [torch.float16, torch.float32, torch.float64]
    assert max(abs(cosine(g, r)) for g, r in zip(gradients, references, strict=True)) < 1e-3


def test_gradients_that_require_grad_are_corrected_without_a_graph():
    gradient = torch.tensor([1.0, 1.0], requires_grad=True)
    correct([gradient], [torch.tensor([-1.0, 0.0])], scope="layer")
    assert gradient.tolist() == [0.0, 1.0]
    assert gradient.grad_fn is None


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_nothing_to_compare_is_no_check(scope):
    assert correct([], [], scope=scope) == Correction()


def test_wrong_input_is_refused_before_anything_changes():
    gradient = torch.tensor([1.0, 1.0])
    with pytest.raises(ConfigError, match="1 gradients but 2 references"):
        correct([gradient], [gradient, gradient], scope="layer")
    with pytest.raises(ConfigError, match=r"shape \(2,\) with a reference of shape \(3,\)"):
        correct([gradient], [-torch.ones(3)], scope="layer")
    with pytest.raises(ConfigError, match="correction must be one of layer, global, got 'off'"):
        correct([gradient], [-gradient], scope="off")
    assert gradient.tolist() == [1.0, 1.0]
