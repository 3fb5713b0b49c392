"""The evaluation at the end of training, which a run that failed does without."""

from __future__ import annotations

from detectron2.engine import HookBase, hooks


class EvalHook(hooks.EvalHook):
    """Detectron2's, but a run that fails in its last iteration is not evaluated.

    Detectron2's also evaluates then, and waits for all processes, of which some may be gone.
    """

    def after_train(self) -> None:
        """Called by the trainer after the last iteration, or after an error."""
        if self.trainer.iter >= self.trainer.max_iter:
            super().after_train()


def evaluated_when_done(given: list[HookBase | None]) -> list[HookBase | None]:
    """Hooks with Detectron2's own for evaluation replaced."""
    return [
        (
            hook
            if hook is None or type(hook) is not hooks.EvalHook
            else EvalHook(hook._period, hook._func)
        )
        for hook in given
    ]
