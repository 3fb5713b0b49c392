"""`SOLVER.ACCUMULATE`: the batch of a step in equal parts, one after the other in each process.

A part needs the memory of its own images only. The gradients of the parts add up to those of the
whole batch, as far as that can be done part by part:

- The loader, the seed, the schedule, the optimizer and clipping see whole batches.
- All parts are padded to the size that the whole batch has.
- RetinaNet and FCOS divide by a running number of positives. The parts share that of the batch.
- All other losses are averaged over the parts, as those of as many processes are. That is the loss
  of the batch where each part has the same share of what the model averages over: images (an RPN),
  sampled boxes (a box head). Masks, keypoints and semantic segmentation average over positives or
  pixels, which differ from part to part.
- An RPN and the heads of boxes sample for one part after the other, so what they draw is random as
  before, but not the same. Norms that learn from a batch (BN) see the images of a part.

Shapes: N images, C channels, height H and width W in pixels.
"""

from __future__ import annotations

import contextlib
from typing import Any, Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from detectron2.modeling import FCOS, RetinaNet
from detectron2.utils.events import EventStorage, get_event_storage
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fpn_plugin.engine.faults.divergence import StepRecorder

PARTS_KEY = "SOLVER.ACCUMULATE"
Sample = dict[str, Any]
Losses = dict[str, Tensor]

# What Detectron2's dense detectors divide by: _MOMENTUM * (its last value) + (1 - _MOMENTUM) *
# (positives of the batch, at least 1); they put the positives of an image into the event storage.
_NORMALIZER, _POSITIVES, _MOMENTUM = "loss_normalizer", "num_pos_anchors", 0.9
_DENSE_LOSSES = frozenset(
    ("loss_cls", "loss_box_reg", "loss_fcos_cls", "loss_fcos_loc", "loss_fcos_ctr")
)


def check_parts(key: str, parts: Any) -> int:
    """The value of `SOLVER.ACCUMULATE`.

    Raises:
        ValueError: naming the key, if it is no whole number from 1 on.
    """
    if not isinstance(parts, int) or isinstance(parts, bool) or parts < 1:
        raise ValueError(f"{key}: {parts!r} is not the number of parts of a batch, from 1 on")
    return parts


class Accumulator(nn.Module):
    """The model as a step trainer calls it with a whole batch; runs it part by part.

    The gradients of all parts but the last are there when it returns, without any communication;
    the trainer's backward pass adds those of the last part, and reduces the sum over the processes.
    So the trainer must zero the gradients before it calls this.

    Args:
        recorder: what one part runs in.
        parts: into how many parts a batch is split.
        key: the config key of `parts`, for messages.
        scale: what a loss passes before its backward pass, as of a gradient scaler.
    """

    def __init__(
        self,
        recorder: StepRecorder,
        parts: int,
        key: str,
        scale: Callable[[Tensor], Tensor] = lambda loss: loss,
    ) -> None:
        super().__init__()
        self.recorder = recorder
        self.parts = parts
        self.key = key
        self.scale = scale
        self._padding = _Padding(self.model)

    @property
    def training(self) -> bool:
        """The model's mode, which Detectron2 checks before each step."""
        return self.recorder.training

    @training.setter
    def training(self, mode: bool) -> None:
        """Nothing to store: `train()` reaches the model as a submodule."""

    @property
    def model(self) -> nn.Module:
        """The model without DDP."""
        return self.recorder.unwrapped

    def forward(self, batch: Sequence[Sample]) -> Losses:
        """The losses of the whole batch. A backward pass gives the gradients of its last part.

        Raises:
            ValueError: if the batch cannot be split.
            DivergedError: as the recorder raises it.
        """
        self.recorder.forget()
        groups = split(batch, self.parts, self.key)
        losses: list[Losses] = []
        weights = _Weights(self.model, self.parts)
        with self._padding.to_size_of(batch), _MeanStorage(get_event_storage()):
            for group in groups:
                is_last = group is groups[-1]
                with contextlib.nullcontext() if is_last else self._without_sync():
                    weights.begin_part()
                    self.recorder(self._padding.pad_targets(group))
                    losses.append(self.recorder.losses)
                    weight = weights.end_part(losses[-1], len(group))
                    if not is_last:
                        self._run_backward(losses[-1], weight)
                        losses[-1] = {name: x.detach() for name, x in losses[-1].items()}
                        # else the next part would share what autocast has cast for this one
                        torch.clear_autocast_cache()
        rest = weights.finish()
        self._scale_gradients(rest)
        total: Losses = {}
        for part, weight in zip(losses, weights.of_parts):
            for name, loss in part.items():
                share = loss * (weight * rest)
                total[name] = total[name] + share if name in total else share
        self.recorder.losses = dict(total)
        return total

    def _without_sync(self) -> contextlib.AbstractContextManager:
        model = self.recorder.model
        is_parallel = isinstance(model, DistributedDataParallel)
        return model.no_sync() if is_parallel else contextlib.nullcontext()  # type: ignore

    def _run_backward(self, losses: Losses, weight: float) -> None:
        with torch.autocast(self.recorder.device, enabled=False):  # as PyTorch recommends
            total = sum(losses.values()) * weight
            self.scale(total).backward()  # type: ignore[arg-type]

    def _scale_gradients(self, factor: float) -> None:
        if factor != 1:
            grads = [x.grad for x in self.model.parameters() if x.grad is not None]
            if grads:
                torch._foreach_mul_(grads, factor)


def split(batch: Sequence[Any], parts: int, key: str) -> list[Sequence[Any]]:
    """A batch in equal parts.

    Raises:
        ValueError: naming the key, if it cannot be divided.
    """
    size, rest = divmod(len(batch), parts)
    if rest or not size:
        raise ValueError(f"{key}: {len(batch)} images of a process cannot be divided by {parts}")
    return [batch[start : start + size] for start in range(0, len(batch), size)]


class _Weights:
    """The factor of each part's losses in those of the batch.

    1 / parts; but for RetinaNet and FCOS, whose losses are sums divided by a running number of
    positives, it is what turns that of the part into that of the batch. The latter is known after
    the last forward pass only, so a factor that all parts have in common comes then.

    Attributes:
        of_parts: what :meth:`end_part` has returned.
    """

    def __init__(self, model: nn.Module, parts: int) -> None:
        self.model: Any = model
        self.parts = parts
        self.of_parts: list[float] = []
        self._shares = isinstance(model, (RetinaNet, FCOS))
        self._before = getattr(model, _NORMALIZER, None)
        self._first = self._first_positives = 0.0  # the first part's
        self._positives = 0.0  # of all parts

    def begin_part(self) -> None:
        """Let each part begin with the normalizer that the step began with."""
        if not self._shares:
            return
        if self._before is not None:
            setattr(self.model, _NORMALIZER, self._before)
        elif hasattr(self.model, _NORMALIZER):
            delattr(self.model, _NORMALIZER)

    def end_part(self, losses: Losses, images: int) -> float:
        """The factor of a part's losses, but for :meth:`finish`'s."""
        if not losses.keys() <= _DENSE_LOSSES:  # one that the user has added may be a mean
            self._shares = False
        weight = 1 / self.parts
        if self._shares:
            normalizer = getattr(self.model, _NORMALIZER)
            positives = round(get_event_storage().latest()[_POSITIVES][0] * images)
            if not self.of_parts:
                self._first, self._first_positives = normalizer, positives
            self._positives += positives
            weight = normalizer / self._first
        self.of_parts.append(weight)
        return weight

    def finish(self) -> float:
        """The factor of all parts' losses; the model's normalizer becomes that of the batch."""
        if not self._shares:
            return 1.0
        more = max(self._positives, 1) - max(self._first_positives, 1)
        normalizer = self._first + (1 - _MOMENTUM) * more
        setattr(self.model, _NORMALIZER, normalizer)
        return self._first / normalizer


class _Padding:
    """Pads what a backbone gets, and the targets of semantic segmentation, to the batch's size.

    What a network computes beside an image depends on how far the image is padded, and so do the
    anchors there. Models pad the images of a part to the largest of them.

    Args:
        model: without a backbone of Detectron2's kind nothing is padded.
    """

    def __init__(self, model: nn.Module) -> None:
        self.size: tuple[int, int] | None = None  # (H, W)
        self._backbone: Any = getattr(model, "backbone", None)
        head = getattr(model, "sem_seg_head", None)
        self._ignored = getattr(head, "ignore_value", None)
        if isinstance(self._backbone, nn.Module):
            hook = self._pad_input
            if getattr(self._backbone, "_compiled_call_impl", None) is not None:
                hook = torch.compiler.disable(hook)  # else each size would be compiled anew
            self._backbone.register_forward_pre_hook(hook)

    @contextlib.contextmanager
    def to_size_of(self, batch: Sequence[Sample]) -> Iterator[None]:
        """A context in which all is padded to the size that this batch would have."""
        self.size = self._size_of(batch)
        try:
            yield
        finally:
            self.size = None

    def _size_of(self, batch: Sequence[Sample]) -> tuple[int, int] | None:
        """As in Detectron2's `ImageList.from_tensors`."""
        constraints = getattr(self._backbone, "padding_constraints", None)
        images = [x["image"] for x in batch if isinstance(x, dict) and "image" in x]
        if constraints is None or len(images) < len(batch) or constraints.get("square_size", 0):
            return None
        stride = constraints.get("size_divisibility", self._backbone.size_divisibility) or 1
        height, width = (max(x.shape[axis] for x in images) for axis in (-2, -1))
        return -(-height // stride) * stride, -(-width // stride) * stride

    def pad_targets(self, group: Sequence[Sample]) -> Sequence[Sample]:
        """A part whose targets of semantic segmentation the model pads to that size."""
        if self.size is None or self._ignored is None or "sem_seg" not in group[0]:
            return group
        target = _padded(group[0]["sem_seg"], self.size, self._ignored)
        return [{**group[0], "sem_seg": target}, *group[1:]]

    def _pad_input(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """A hook of the backbone, for a batch `(N, C, H, W)`."""
        if self.size is None or not isinstance(inputs[0], Tensor) or inputs[0].dim() != 4:
            return None
        return (_padded(inputs[0], self.size, 0.0), *inputs[1:])


def _padded(x: Tensor, size: tuple[int, int], value: float) -> Tensor:
    """`x`, `(..., H, W)`, filled up to that size on the right and at the bottom."""
    bottom, right = size[0] - x.shape[-2], size[1] - x.shape[-1]
    return F.pad(x, (0, right, 0, bottom), value=value) if bottom or right else x


class _MeanStorage(EventStorage):
    """What a model records in the parts of a step: the means go to the storage of the run."""

    def __init__(self, run: EventStorage) -> None:
        super().__init__(run.iter)
        self._run = run

    def put_image(self, *args: Any, **kwargs: Any) -> None:
        """To the storage of the run."""
        self._run.put_image(*args, **kwargs)

    def put_histogram(self, *args: Any, **kwargs: Any) -> None:
        """To the storage of the run."""
        self._run.put_histogram(*args, **kwargs)

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        hints = self.smoothing_hints()
        for name, history in self.histories().items():
            self._run.put_scalar(name, history.global_avg(), smoothing_hint=hints[name])
