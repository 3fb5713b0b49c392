"""Training stops before a step that would ruin the weights, and says where that begins."""

from __future__ import annotations

import copy
import re
import time
from pathlib import Path
from typing import Any, Callable, Sequence

import pytest
import torch
from bad import OURS, At, Root, nan_box, nan_pixel, spoilt_trainer, train_where_one_is_bad
from detectron2.config import CfgNode
from detectron2.engine import SimpleTrainer, launch
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from test_resume import assert_same
from tiny import VAL
from torch import Tensor, nn

from fpn_plugin.checkpoint.checkpointer import Checkpointer
from fpn_plugin.checkpoint.finite import (
    DivergedError,
    broken_weights,
    is_finite,
    non_finite,
    tensors_of,
)
from fpn_plugin.engine.faults.diagnose import (
    ForwardTrace,
    _has_non_finite,
    find_origin,
    random_state,
)
from fpn_plugin.engine.faults.divergence import DivergenceRules, StepRecorder, divergence_rules
from fpn_plugin.engine.step import make_step_trainer
from fpn_plugin.engine.trainer import Trainer

MakeConfig = Callable[..., CfgNode]
FIRST = "model_0000000.pth"


def stopped(trainer: Trainer) -> str:
    """What a run that stops in its second iteration says, after a look at what it leaves."""
    with pytest.raises(DivergedError) as caught:
        trainer.train()
    folder, message = Path(trainer.cfg.OUTPUT_DIR), str(caught.value)
    assert [file.name for file in folder.glob("*.pth")] == [FIRST]
    assert (folder / "last_checkpoint").read_text() == FIRST
    assert message.startswith("Iteration 1: ") and f"goes on from {folder / FIRST}" in message
    assert "What may help: a lower SOLVER.BASE_LR (" in message
    return message


def config(make_config: MakeConfig, **overrides: Any) -> CfgNode:
    return make_config(SOLVER__CHECKPOINT_PERIOD=1, TEST__EVAL_PERIOD=0, **{**OURS, **overrides})


def infinite(path: str) -> Callable[[Any], None]:
    def spoil(model: nn.Module) -> None:
        model.get_parameter(path)[0, 0] = torch.inf

    return spoil


def overflow(model: Any) -> None:
    """Finite weights, whose products are not."""
    model.backbone.fpn_output4.weight.fill_(1e38)


def root_of_zero(model: Any) -> None:
    model.backbone.fpn_output3 = nn.Sequential(model.backbone.fpn_output3, Root())


def bad_code(model: Any) -> None:
    """What no module of its own computes: the anchors that the deltas are applied to."""
    model.proposal_generator.box2box_transform.scale_clamp = torch.inf
    model.proposal_generator.rpn_head.anchor_deltas.bias.fill_(1e30)


SPOILT_MODELS = {
    "a node's weight": (
        infinite("backbone.fpn_lateral3.weight"),
        r"the weights, before the step: pyramid node 'fpn_lateral3' \(backbone.fpn_lateral3.weight",
    ),
    "a head's weight": (
        infinite("roi_heads.box_predictor.cls_score.weight"),
        "the weights, before the step: roi_heads.box_predictor.cls_score.weight",
    ),
    "a node": (overflow, r"begins in pyramid node 'fpn_output4' \(backbone.fpn_output4\)"),
    "a gradient": (
        root_of_zero,
        r"the loss is finite \(\d.*\), but gradients are not(.|\n)*begins in the gradient of what"
        r" pyramid node 'fpn_output3' \(backbone.fpn_output3.0\) gives, as it comes back from"
        r" pyramid node 'fpn_output3' \(backbone.fpn_output3.1\)",
    ),
    "a head's own code": (bad_code, r"a check of Detectron2 failed(.|\n)*in proposal_generator"),
}


@pytest.mark.parametrize("name", SPOILT_MODELS)
def test_a_model_that_goes_bad(name: str, make_config: MakeConfig) -> None:
    spoil, expected = SPOILT_MODELS[name]
    trainer = Trainer(config(make_config, DATASETS__TEST=(VAL,)))
    trainer.register_hooks([At(spoil)])
    message = stopped(trainer)
    assert not Path(trainer.cfg.OUTPUT_DIR, "inference").exists(), "it was the last iteration"
    assert re.search(expected, message), message
    if name == "a gradient":  # the step was not taken
        saved = torch.load(Path(trainer.cfg.OUTPUT_DIR, FIRST))["model"]
        weights = dict(trainer.checkpointer.model.named_parameters())
        assert all(torch.equal(x, weights[key]) for key, x in saved.items() if key in weights)


def test_a_bad_box_is_named(make_config: MakeConfig) -> None:
    message = stopped(spoilt_trainer(nan_box)(config(make_config, SOLVER__AMP__ENABLED=True)))
    expected = r"the batch, before the model: 'instances.gt_boxes' of sample 0 \(.*\.png\)"
    assert re.search(expected, message), message
    assert "SOLVER.AMP.ENABLED False (PRECISION is auto)" in message


def test_a_stopped_run_goes_on_as_if_there_were_no_guard(make_config: MakeConfig) -> None:
    """A bad image stops it; without that image it ends as an unbroken run of Detectron2's step."""
    cfg = config(make_config)
    torch.manual_seed(0)
    message = stopped(spoilt_trainer(nan_pixel)(cfg))
    assert re.search(r"the batch, before the model: 'image' of sample 0 \(.*\.png\)", message)
    resumed = Trainer(cfg)
    resumed.resume_or_load(resume=True)
    assert resumed.start_iter == 1
    resumed.train()
    torch.manual_seed(0)
    plain = Trainer(config(make_config, output="plain"))
    guarded = plain._trainer
    plain._trainer = SimpleTrainer(plain.model, guarded.data_loader, guarded.optimizer)
    plain.train()
    assert_same(resumed.model.state_dict(), plain.model.state_dict())


def test_a_loss_that_explodes(make_config: MakeConfig) -> None:
    torch.manual_seed(0)
    cfg = config(make_config, SOLVER__BASE_LR=100.0, SOLVER__WARMUP_ITERS=0)
    with pytest.raises(DivergedError) as caught:
        Trainer(cfg).train()
    message = str(caught.value)
    assert re.search(r"explodes: \S+e\+\d+ is more than SOLVER.MAX_LOSS_RATIO \(10000\)", message)
    assert re.search(r"loss_cls \S+e\+\d+ after [01]\.\d+, loss_box_reg", message)
    assert re.search(r"begins in pyramid node '\w+' .*, the first part to give numbers", message)
    assert "SOLVER.BASE_LR (100)" in message


def test_two_processes(dataset: Path, quick_ranks: None, tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(Exception):  # of one of them, whichever ends first
        launch(train_where_one_is_bad, 2, dist_url="auto", args=(str(dataset), str(tmp_path)))
    assert time.monotonic() - began < 100, "a process has waited for the other one"
    one, other, alone = (
        (tmp_path / f"{name}.txt").read_text() for name in ("retina0", "retina1", "rcnn1")
    )
    assert one == other and "the loss is not finite (loss_cls nan, loss_box_reg nan)" in one
    for message in (one, alone):
        assert message.startswith("Iteration 2: ")
        assert re.search(r"the batch, before the model: 'image' of sample 0 \(.*\.png\)", message)
    assert ".png) (process 1)." in one and "a check of Detectron2 failed" in alone
    for run in ("retina", "rcnn"):
        assert (tmp_path / run / "last_checkpoint").read_text() == "model_0000001.pth"


class Toy(nn.Module):
    """Its loss is what it is given, whatever its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(1, 1)

    def forward(self, batch: Sequence[Tensor]) -> dict[str, Tensor]:
        value = batch[0].reshape(1, 1)
        return {"loss_a": (self.head(value) * 0).sum() + value.sum()}


def toy(values: Sequence[float], ratio: float = 10000) -> SimpleTrainer:
    model = Toy()
    rules = DivergenceRules(ratio)
    loader = [[torch.tensor(float(value))] for value in values]
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    return make_step_trainer(model, loader, optimizer, "cpu", None, rules)


LOSSES = {
    "high at first": ([1e6, 1e5, 1e4, 1e3, 10, 1, 5000], 10000, None),
    "sudden": ([1, 2, 1, 1, 2e4], 10000, 4),
    "negative": ([-1, -1, -2e4], 10000, 2),
    "near zero": ([1e-6] * 30 + [100, 9000], 10000, None),
    "slow": ([2.0**i for i in range(60)], 10000, 14),
    "not a number": ([1, float("nan")], 10000, 1),
    "infinite": ([float("inf")], 10000, 0),
    "no limit": ([1, 1e30], 0, None),
    "no limit, infinite": ([1, float("inf")], 0, 1),
}


@pytest.mark.parametrize("name", LOSSES)
def test_when_it_stops(name: str) -> None:
    values, ratio, at = LOSSES[name]
    trainer = toy(values, ratio)
    if at is None:
        return trainer.train(0, len(values))
    with pytest.raises(DivergedError, match=f"^Iteration {at}: the loss"):
        trainer.train(0, len(values))


@pytest.mark.parametrize("value, error", [(float("nan"), DivergedError), (1.0, AssertionError)])
def test_detectron2s_assertions(value: float, error: type[Exception]) -> None:
    """They are about numbers that are not finite, or about something else."""

    def check(*args: Any) -> None:
        raise AssertionError("Box tensor contains infinite or NaN!")

    trainer = toy([value])
    trainer.model.unwrapped.register_forward_hook(check)
    with pytest.raises(error, match="Box tensor contains infinite or NaN!"):
        trainer.train(0, 1)


def test_a_resumed_run_stops_where_the_unbroken_one_would() -> None:
    first = toy([1.0] * 5)
    first.train(0, 5)
    second = toy([20000.0])
    second.load_state_dict(first.state_dict())
    with pytest.raises(DivergedError, match="^Iteration 5: .*10000.* times 1, .* after 1"):
        second.train(5, 6)


@pytest.mark.parametrize("value", [-1, 1, 0.5, True, float("inf"), float("nan"), "no"])
def test_a_bad_ratio(value: Any, make_config: MakeConfig) -> None:
    cfg = make_config()
    cfg.SOLVER.MAX_LOSS_RATIO = value
    with pytest.raises(ValueError, match=f"SOLVER.MAX_LOSS_RATIO: {value!r} is neither 0"):
        divergence_rules(cfg)


def test_a_scaler_that_skips_each_step() -> None:
    """As on a GPU in fp16, with torch's scaler for the CPU."""
    trainer: Any = toy([1.0] * 30)
    trainer.grad_scaler = scaler = torch.amp.GradScaler("cpu")
    trainer.model.unwrapped.head.weight.register_hook(lambda grad: grad + torch.inf)

    def step() -> None:
        loss = sum(trainer.model(next(trainer._data_loader_iter)).values())
        trainer.optimizer.zero_grad()
        scaler.scale(loss).backward()
        trainer.after_backward()
        scaler.step(trainer.optimizer)
        scaler.update()

    trainer.run_step = step
    with pytest.raises(DivergedError, match="^Iteration 20: .* 20 iterations in a row") as caught:
        trainer.train(0, 30)
    assert "the gradient of head.weight" in str(caught.value)


def test_no_checkpoint_of_bad_weights(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    checkpointer = Checkpointer(model, str(tmp_path))
    checkpointer.save("model_0000000")
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    model[1].running_var[0] = torch.inf
    model[0].weight.data[0, 0] = torch.nan
    expected = "model_final.pth is not written: 2 of its weights and .*: 0.weight, 1.running_var"
    with pytest.raises(DivergedError, match=expected):
        checkpointer.save("model_final")
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_what_is_finite() -> None:
    large = torch.full((4,), 3e38)
    assert is_finite(large) and is_finite(large.half().long()) and is_finite(torch.zeros(0))
    for bad in (torch.nan, torch.inf, -torch.inf):
        assert not is_finite(torch.tensor([1.0, bad, -bad, 1.0]))
        assert not is_finite(torch.tensor([bad], dtype=torch.bfloat16))
    boxes = Boxes(torch.tensor([[0, 0, 1, torch.nan]]))
    sample = {"image": torch.ones(1), "instances": Instances((1, 1), gt_boxes=boxes), "id": 3}
    assert non_finite(tensors_of([sample])) == ["[0].instances.gt_boxes"]


def test_code_between_two_parts() -> None:
    class Between(nn.Sequential):
        def forward(self, batch: Any) -> Any:
            return self[1](self[0](torch.ones(1, 1)).abs().neg().log())

    trace = ForwardTrace(
        model := nn.Sequential(Between(nn.Linear(1, 1), nn.Identity())), _has_non_finite
    )
    with trace:
        model(())
    assert trace.first == "0, in its own code before 0.1 runs"
    assert not any(module._forward_hooks for module in model.modules())


class Drawing(nn.Sequential):
    """Draws in its forward pass, and notes what."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(2, 2), nn.BatchNorm1d(2))
        self.drawn: list[float] = []

    def forward(self, batch: Tensor) -> dict[str, Tensor]:
        self.drawn.append(float(torch.rand(1)))
        return {"loss": super().forward(batch).square().mean()}


def test_looking_for_it_changes_nothing() -> None:
    model, batch, random = Drawing(), torch.randn(4, 2), random_state("cpu")

    def state() -> Any:
        grads = [x.grad for x in model.parameters()]
        return copy.deepcopy((dict(model.state_dict()), grads, torch.get_rng_state()))

    model(batch)["loss"].backward()
    before = state()
    assert find_origin(model, batch, device="cpu", dtype=None, random=random, backward=True) == ""
    assert model.drawn[0] == model.drawn[1]
    assert_same(before, state())


def test_no_room_for_looking_at_the_gradients() -> None:
    model = nn.Linear(1, 1)

    def full(grad: Tensor) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    model.weight.register_hook(full)
    call = nn.Module()
    call.model, call.forward = model, lambda batch: {"loss": model(torch.ones(1, 1)).sum()}
    options: dict[str, Any] = {"device": "cpu", "dtype": None, "random": random_state("cpu")}
    assert find_origin(call, (), backward=True, **options) == ""


def test_norms_over_all_processes_are_not_run_again_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that finds it in its batch would leave the other waiting in its forward pass."""
    model = nn.Sequential(nn.SyncBatchNorm(2))
    watched = StepRecorder(model, "cpu", None, DivergenceRules())
    watched.runs.append(([], random_state("cpu")))
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(comm, "all_gather", lambda found: ["", found])
    monkeypatch.setattr(model, "forward", lambda batch: pytest.fail("it waits"))
    assert watched.find_origin(backward=True) == ""
    watched.runs.append(([{"image": torch.full((1,), torch.nan)}], {}))
    assert watched.find_origin() == "the batch, before the model: 'image' of sample 0 (process 1)"


def test_infinity_in_a_mask_is_meant() -> None:
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Identity())
    model[1].register_buffer("mask", torch.tensor([0.0, -torch.inf]))
    assert broken_weights(model) == []
    model[0].running_var.fill_(torch.inf)
    assert broken_weights(model) == ["0.running_var"]
    assert broken_weights(model, {"0.running_var"}) == []
    model[1].mask[0] = torch.nan
    assert broken_weights(model, {"0.running_var"}) == ["1.mask"]
