"""Recipes of the tests."""

from dataclasses import replace

from lrsd.recipe import Recipe
from lrsd.settings import Calibration


def on(recipe: Recipe, text: Calibration) -> Recipe:
    """The recipe with another calibration text, its size and seed."""
    known = {name: getattr(text, name) for name in ("calib", "samples", "seqlen", "seed")}
    return replace(recipe, calibration=replace(recipe.calibration, **known))
