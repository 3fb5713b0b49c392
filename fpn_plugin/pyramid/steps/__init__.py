"""STEPS: operators on the maps of several levels at once. Shapes are `(N, C, H, W)`."""

from fpn_plugin.pyramid.steps import msdeform, neighbours
from fpn_plugin.pyramid.steps.base import STEPS

__all__ = ["STEPS", "msdeform", "neighbours"]
