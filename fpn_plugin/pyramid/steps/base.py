"""What every step is registered as."""

from __future__ import annotations

from typing import Callable

from torch import nn

from fpn_plugin.registry import Registry

# A step is built as `Step(channels, levels, **arguments)`, with the levels of its maps from high to
# low resolution, and with the pyramid's `norm` and `activation` if it takes them. It is called with
# a list of maps `(N, C, H, W)`, one per level, and returns a list of as many of the same sizes. A
# coarser map need not be half as large as a finer one, but at least a pixel.
STEPS: Registry[Callable[..., nn.Module]] = Registry("step")
