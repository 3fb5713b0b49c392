"""Which checkpoint a run goes on from that its launcher has started again."""

from __future__ import annotations

from typing import Any

import pytest

from fpn_plugin.engine.elastic import Found, Saved, agent_of, choose_checkpoint

KEY = "OUTPUT_DIR"


def found(rank: int, run: str = "", saved: Saved | None = None, **values: Any) -> Found:
    return Found(
        rank, f"out of host{rank}", f"agent {rank}", run, (), 2, saved, values.get("broken", "")
    )


def saved(iteration: int, digest: int = 1, made_with: int = 5) -> Saved:
    return Saved(f"model_{iteration:07d}.pth", iteration, digest, made_with, 100)


def test_an_agent_keeps_its_name_through_its_restarts() -> None:
    def name(attempt: int, agent: str = "a") -> str:
        file = f"/runs/x/run_{agent}/attempt_{attempt}/0/error.json"
        return agent_of({"TORCHELASTIC_RUN_ID": "run", "TORCHELASTIC_ERROR_FILE": file})

    assert name(0) == name(2) != name(0, "b")
    assert agent_of({}) == ""


def test_the_newest_checkpoint_of_the_run_is_chosen() -> None:
    hosts = [found(0), found(1, "run", saved(7)), found(2, "old", saved(99))]
    chosen = choose_checkpoint(hosts, "run", KEY)
    assert chosen is not None and chosen.rank == 1
    equal = [found(0, "run", saved(7)), found(1, "run", saved(7))]
    chosen = choose_checkpoint(equal, "run", KEY)
    assert chosen is not None and chosen.rank == 0
    assert choose_checkpoint([found(0, broken=""), found(1, broken="")], "", KEY) is None
    with pytest.raises(ValueError, match="none is whole.*host1"):
        choose_checkpoint([found(0, broken=""), found(1, broken="none is whole")], "", KEY)


@pytest.mark.parametrize(
    "other, text",
    [
        (found(1, "b", saved(9)), "of different runs"),
        (found(1, "a", saved(7, digest=2)), "not the same"),
        (found(1, "", saved(9, made_with=6)), "of different runs"),
    ],
)
def test_checkpoints_that_disagree_are_refused(other: Found, text: str) -> None:
    with pytest.raises(ValueError, match=f"OUTPUT_DIR: .*{text}.*host0.*host1"):
        choose_checkpoint([found(0, "a", saved(7)), other], "", KEY)
