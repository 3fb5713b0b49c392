"""Every pyramid that another package has too, against that package: maps, statistics, gradients,
parameters."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
from references import R50, RECIPES, SMALL, Recipe, Reference, randomize_weights
from torch import Tensor

for recipes in sorted(Path(__file__).parent.glob("*_recipes.py")):
    importlib.import_module(recipes.stem)
# of the largest value of a map; a weight's gradient is a sum over all pixels
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def assert_near(what: str, ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    assert ours.shape == theirs.shape, what
    worst = (ours - theirs).abs().max().item()
    assert worst <= tolerance * max(1.0, theirs.abs().max().item()), (what, worst)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_maps_statistics_and_gradients_equal_the_reference(name: str, dtype: torch.dtype) -> None:
    recipe = RECIPES[name]
    torch.manual_seed(0)
    reference = recipe.build({level: SMALL[level] for level in recipe.levels}, recipe.width)
    randomize_weights(reference.theirs)
    reference.copy_weights()
    for module in (reference.ours, reference.theirs):
        module.to(dtype)
    for training in (False, True):
        for size in recipe.sizes:
            compare(recipe, reference, dtype, training, size)


def compare(
    recipe: Recipe,
    reference: Reference,
    dtype: torch.dtype,
    training: bool,
    size: tuple[int, int],
) -> None:
    ours, theirs = reference.ours.train(training), reference.theirs.train(training)
    maps = reference.inputs({level: SMALL[level] for level in recipe.levels}, size)
    mine = {name: x.to(dtype).requires_grad_() for name, x in maps.items()}
    other = {name: x.to(dtype).requires_grad_() for name, x in maps.items()}
    outputs = ours(mine)
    expected = reference.run(theirs, {name: x.clone() for name, x in other.items()})
    assert len(outputs) == len(expected) > 0
    tolerance = TOLERANCE[dtype]
    for (name, x), y in zip(outputs.items(), expected):
        assert y.std() > 0.01, name  # not a comparison of zeros
        assert_near(name, x, y, tolerance)
    weights = [torch.randn_like(y) / y[0, 0].numel() for y in expected]
    ours.zero_grad()
    theirs.zero_grad()
    sum((x * w).sum() for x, w in zip(outputs.values(), weights)).backward()
    sum((y * w).sum() for y, w in zip(expected, weights)).backward()
    for name, x in mine.items():
        assert_near(f"gradient of {name}", x.grad, other[name].grad, tolerance)
    gradients = {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in theirs.named_parameters()
    }
    buffers = {name: x for name, x in theirs.named_buffers() if "num_batches" not in name}
    converted = reference.convert({**gradients, **buffers})
    for name, p in ours.named_parameters():
        grad = torch.zeros_like(p) if p.grad is None else p.grad
        assert_near(f"gradient of {name}", grad, converted[name], 10 * tolerance)
    for name, x in ours.named_buffers():
        if name in converted:
            assert_near(name, x, converted[name], tolerance)


@pytest.mark.parametrize("name", [name for name, each in RECIPES.items() if each.parameters])
def test_parameters_are_the_published_ones(name: str) -> None:
    recipe = RECIPES[name]
    with torch.device("meta"):
        reference = recipe.build({level: R50[level] for level in recipe.levels}, 256)
    assert sum(p.numel() for p in reference.ours.parameters()) == recipe.parameters
