"""The dataset dicts that the processes of a host share."""

from __future__ import annotations

from pathlib import Path

import pytest
from detectron2.engine import launch
from shared_child import RECORDS, read_together

from fpn_plugin.data.shared_records import SharedRecords, one_copy_per_host, write_records


def test_records_come_back_as_they_were(tmp_path: Path) -> None:
    path = str(tmp_path / "records")
    write_records(RECORDS, path)
    shared = SharedRecords(path)
    (tmp_path / "records").unlink()
    assert len(shared) == 5 and list(shared) == RECORDS
    with pytest.raises(IndexError):
        shared[5]
    write_records([], path)
    assert list(SharedRecords(path)) == []


def test_one_process_has_detectron2s_list_and_the_errors_of_its_loader() -> None:
    assert list(one_copy_per_host(lambda: list(RECORDS), ())) == RECORDS
    with pytest.raises(ZeroDivisionError):
        one_copy_per_host(lambda: [1 / 0], ())


def test_of_two_processes_one_reads_and_both_fail_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    launch(read_together, 2, dist_url="auto", args=(str(tmp_path),))
    assert [path.name for path in tmp_path.iterdir()] == ["read_by_0"]
