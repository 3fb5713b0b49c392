"""What needs no clock: parameters, operations, activations, peak memory."""

from __future__ import annotations

from typing import Any

import torch
from detectron2.utils.analysis import FlopCountAnalysis

from fpn_plugin.analysis.benchmark.clock import no_lap
from fpn_plugin.analysis.benchmark.entrants import Entrant
from fpn_plugin.analysis.benchmark.inputs import Inputs
from fpn_plugin.analysis.benchmark.memory import peak_bytes
from fpn_plugin.analysis.benchmark.neck import below_name
from fpn_plugin.analysis.benchmark.subjects import neck_subject
from fpn_plugin.analysis.visualize.complexity import count_parameters, totals

COUNTS = (
    "model_parameters",
    "backbone_parameters",
    "neck_parameters",
    "backbone_gflops",
    "neck_gflops",
    "backbone_activations",
    "neck_activations",
    "neck_peak_bytes",
)
"""What :func:`count` gives; less is better. GFLOPs are fvcore's: 10^9 multiply-accumulates."""


def count(entrant: Entrant, inputs: Inputs) -> dict[str, float]:
    """The figures of COUNTS: operations and activations for one image, bytes for a batch."""
    model: Any = entrant.model
    found = totals(model.backbone, below_name(model.backbone), inputs.size)
    whole, neck = found["backbone"], found["neck"]
    work = neck_subject(entrant, inputs).work
    work(no_lap)  # whatever is made once is made
    return {
        "model_parameters": count_parameters(model),
        "backbone_parameters": whole.parameters,
        "neck_parameters": neck.parameters,
        "backbone_gflops": whole.flops / 1e9,
        "neck_gflops": neck.flops / 1e9,
        "backbone_activations": whole.activations,
        "neck_activations": neck.activations,
        "neck_peak_bytes": peak_bytes(lambda: work(no_lap), inputs.device),
    }


@torch.no_grad()
def model_gflops(model: Any, images: list[dict[str, Any]]) -> float:
    """Of a whole detector on images: that of its heads depends on what it finds in them."""
    analysis = FlopCountAnalysis(model, images)
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    return analysis.tracer_warnings("none").total() / 1e9
