"""`MODEL.EMA`: what is averaged, evaluated and saved; and that a run is trained as without."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable

import pytest
import torch
from crash_child import OVERRIDES
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from omegaconf import OmegaConf
from tiny import VAL
from torch import Tensor, nn

from fpn_plugin.config.learning import EMASettings, ema_settings
from fpn_plugin.engine.ema import EMAHook
from fpn_plugin.engine.trainer import Trainer

MakeConfig = Callable[..., CfgNode]
SMALL = {key: value for key, value in OVERRIDES.items() if key.startswith("MODEL")}
EMA = {"MODEL__EMA__ENABLED": True, "MODEL__EMA__DECAY": 0.7, "TEST__EVAL_PERIOD": 0}


class Recorder(HookBase):
    """Keeps the weights after each step."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.states = [self.copy()]

    def copy(self) -> dict[str, Tensor]:
        return {name: x.clone() for name, x in self.model.state_dict().items()}

    def after_step(self) -> None:
        self.states.append(self.copy())


class Evaluated(Trainer):
    """Keeps the weights that are evaluated."""

    seen: list[dict[str, Tensor]] = []

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators: Any = None) -> dict[str, Any]:
        cls.seen.append({name: x.clone() for name, x in model.state_dict().items()})
        return {}


def train(cfg: CfgNode, resume: bool = False) -> tuple[Evaluated, Recorder]:
    torch.manual_seed(0)
    trainer = Evaluated(cfg)
    recorder = Recorder(trainer.checkpointer.model)
    trainer.register_hooks([recorder])
    trainer.resume_or_load(resume=resume)
    trainer.train()
    return trainer, recorder


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def test_a_run_saves_and_evaluates_averages_and_trains_as_without(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    keys = {**SMALL, "SOLVER__CHECKPOINT_PERIOD": 2, "DATASETS__TEST": (VAL,)}
    keys |= {"MODEL__BACKBONE__FREEZE_AT": 1, "SOLVER__MAX_ITER": 4, "SOLVER__STEPS": (3,)}
    keys["TEST__EVAL_PERIOD"] = 0
    _, plain = train(make_config("plain", **keys))
    Evaluated.seen.clear()
    trainer, recorder = train(make_config(**{**keys, **EMA}))
    assert_equal(recorder.states[-1], plain.states[-1])

    # D2Go's rule, of all that is floating point, in double precision
    averages = {name: x.double() for name, x in recorder.states[0].items()}
    for n, state in enumerate(recorder.states[1:], 1):
        decay = min(0.7, (1 + n) / (10 + n))
        for name, x in state.items():
            averages[name] = averages[name] * decay + x.double() * (1 - decay)
    final = torch.load(tmp_path / "run" / "model_final.pth")
    changed = 0
    for name, x in final["model"].items():
        expected = recorder.states[-1][name].double()
        if x.is_floating_point():
            assert torch.allclose(x.double(), averages[name], atol=1e-6, rtol=1e-5), name
            changed += not torch.allclose(x.double(), expected, atol=1e-6, rtol=1e-5)
        else:
            assert torch.equal(x, recorder.states[-1][name]), name
    assert changed > 50
    assert len(Evaluated.seen) == 1
    assert_equal(Evaluated.seen[0], dict(final["model"]))
    trained = final["trainer"]["hooks"]["EMAHook"]["trained"]
    assert "backbone.bottom_up.stem.conv1.weight" not in trained, "it is frozen"
    for name, x in trained.items():
        assert torch.equal(x, recorder.states[-1][name])
    with trainer.ema.in_model(), trainer.ema.in_model():
        assert_equal(recorder.copy(), dict(final["model"]))
    assert_equal(recorder.copy(), recorder.states[-1])

    # without the average the run goes on from the weights as trained, and so does one that is new
    after = {**keys, "SOLVER__MAX_ITER": 5}
    resumed, without = train(make_config(**after), resume=True)
    _, plain = train(make_config("plain", **after), resume=True)
    assert_equal(without.states[-1], plain.states[-1])
    later, recorder = train(make_config("plain", **{**after, **EMA, "SOLVER__MAX_ITER": 6}), True)
    assert later.ema.updates == 1
    with later.ema.in_model():
        averaged = recorder.copy()
    name = "roi_heads.box_head.fc1.weight"
    first, last = plain.states[-1][name], recorder.states[-1][name]
    torch.testing.assert_close(averaged[name], first + (last - first) * (1 - 2 / 11))


def test_shared_weights_are_averaged_once_and_errors_restore_the_model() -> None:
    model = nn.ModuleList([nn.Linear(2, 2, bias=False), nn.BatchNorm1d(2)])
    model.append(model[0])
    hook = EMAHook(model, EMASettings(0.5, -1))
    hook.before_train()
    with torch.no_grad():
        model[0].weight.fill_(3.0)
    before = model[0].weight.clone()
    start = hook._averages["0.weight"].clone()
    hook.after_step()
    with pytest.raises(KeyError), hook.in_model():
        torch.testing.assert_close(model[2].weight, (start + 3) / 2)
        raise KeyError
    assert torch.equal(model[0].weight, before)
    off = EMAHook(model, None)
    off.before_train()
    off.after_step()
    assert off.state_dict() == {} and not off._averages


@pytest.mark.parametrize(
    "entries, message",
    [
        ({"decay": 1.0}, r"train\.model_ema\.decay: 1\.0 .* from 0 to below 1"),
        ({"decay": "0.9"}, r"train\.model_ema\.decay: '0\.9'"),
        ({"decay_warm_up_factor": -2}, r"train\.model_ema\.decay_warm_up_factor: -2"),
        ({"momentum": 0.1}, r"train\.model_ema: unknown name 'momentum'.* decay, decay_warm"),
    ],
)
def test_bad_settings(entries: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, KeyError), match=message):
        ema_settings(OmegaConf.create(entries), "train.model_ema")
    assert ema_settings({"enabled": True, "decay": 0}, "x") == EMASettings(0.0, 10)
