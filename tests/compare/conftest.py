"""A study of two configs with two seeds each, made up, and its comparison."""

from __future__ import annotations

import pytest
from comparing import Study, detect, evaluation, write_run, write_truth

from fpn_plugin.compare import costs
from fpn_plugin.compare.comparison import compare


@pytest.fixture(autouse=True)
def _small_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Operations are counted on these."""
    monkeypatch.setattr(costs, "SIZE", (64, 64))


@pytest.fixture(scope="session")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """Box and mask AP of `fpn`, and of `pafpn`, whose boxes are better."""
    folder = tmp_path_factory.mktemp("study")
    truth = folder / "truth.json"
    content = write_truth(truth, images=10)
    folders = []
    for name, error in (("fpn", 0.4), ("pafpn", 0.1)):
        for seed in (0, 1):
            results = detect(content, error, seed, masks=True)
            folders.append(
                write_run(
                    *(folder / name / f"seed-{seed}", truth, results, [evaluation(9.0)]),
                    SEED=seed,
                    MODEL__FPN__TOPOLOGY=name,
                )
            )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(costs, "SIZE", (64, 64))
        page = compare(
            folders, str(folder / "report"), size_bins=[4, 16, 64], resamples=100, quiet=True
        )
    return Study(folders, truth, page.parent)
