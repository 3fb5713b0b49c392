"""The pyramids whose levels read their two neighbours, all with the same weights: one step each."""

from __future__ import annotations

from typing import Any

from fpn_plugin.pyramid.topologies.base import (
    INNER_LEVELS,
    TOPOLOGIES,
    Graph,
    Levels,
    Style,
    add_inner_levels,
    by_level,
    graph_of,
    need_levels,
    op,
    step,
)

INNER_LEVELS["dyhead"] = 0  # P6 and P7 of their authors are made only where they are asked for
INNER_LEVELS["sepc"] = 0


@TOPOLOGIES.register("dyhead")
def dyhead(inputs: Levels, style: Style, **arguments: Any) -> Graph:
    """Dynamic head, Dai et al. 2021, arXiv:2106.08322.

    After another pyramid: six blocks of attention over places, scales and channels. The paper's is
    `fpn+dyhead`; MMDetection makes P6 and P7 before (`inner_levels=2`, `downsample="conv"`), so
    that they take part. It takes the place of the convolutions in a one-stage head.

    ::

        S_l = mean of hs(ReLU(w . GAP(Z) + b)) Z over Z of:    (hs(v) = min(max(v + 3, 0), 6) / 6)
              norm(DCN(X_l)),  norm(DCN s2(X_{l-1})),  norm(DCN(bilinear(X_{l+1})))
        P_l = max(a1 S_l + b1, a2 S_l + b2),  a, b = hs(FC(ReLU(FC(GAP(S_l)))))

    Args:
        arguments: of the step: `fpn+dyhead(depth=4)`.
    """
    return _alone(inputs, style, "dyhead", arguments)


@TOPOLOGIES.register("sepc")
def sepc(inputs: Levels, style: Style, **arguments: Any) -> Graph:
    """Scale-equalizing pyramid convolution, Wang et al. 2020, arXiv:2005.03101.

    After another pyramid: four convolutions over levels and places. The paper's is `fpn+sepc` with
    P6 and P7 (`inner_levels=2`, `downsample="conv"`). All levels share its weights, and its norm.

    ::

        P_l = ReLU(norm(3x3(X_l) + 3x3 s2(X_{l-1}) + bilinear(3x3(X_{l+1}))))    (four times)

    Args:
        arguments: of the step: `fpn+sepc(deformable=True)`.
    """
    return _alone(inputs, style, "sepc", arguments)


def _alone(inputs: Levels, style: Style, name: str, arguments: dict[str, Any]) -> Graph:
    """A step on all inputs, and on the coarser levels that are asked for."""
    need_levels(name, inputs, 2, style.inner_levels)
    maps = by_level(inputs)
    nodes = add_inner_levels(name, maps, style.inner_levels)
    last = step(name, maps, op(name, **arguments))
    outputs = {level: output for output, level in last.maps().items()}
    return graph_of(inputs, [*nodes, last], outputs)
