"""Networks for images of other than three channels, from weights for three. timm does the same."""

from __future__ import annotations

from torch import Tensor, nn


def adapt_weight(weight: Tensor, channels: int) -> Tensor:
    """The weight `(N, 3, H, W)` of a convolution that reads RGB, for images of other channels.

    One channel gets the sum of the three: a gray image gives what it gives as RGB. Of more, channel
    i gets that of i modulo 3, scaled by 3 / channels.
    """
    if channels == 1:
        return weight.float().sum(1, keepdim=True).to(weight.dtype)
    copies = weight.float()[:, [i % 3 for i in range(channels)]]
    return (copies * (3 / channels)).to(weight.dtype)


def set_image_channels(network: nn.Module, channels: int, source: str) -> None:
    """Let the first convolution of a network read images of so many channels, in place.

    Args:
        source: the network's name, for messages.

    Raises:
        ValueError: if its first convolution does not read RGB.
    """
    first = next((x for x in network.modules() if isinstance(x, nn.Conv2d)), None)
    if first is None or first.in_channels != 3:
        raise ValueError(
            f"MODEL.BOTTOM_UP.NAME: {source} takes images of 3 channels, not {channels}"
            " (MODEL.PIXEL_MEAN has one value per channel)"
        )
    first.in_channels = channels
    first.weight = nn.Parameter(adapt_weight(first.weight.detach(), channels))
