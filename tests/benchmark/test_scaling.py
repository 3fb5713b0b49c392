"""The model of a step's time, against numbers worked out by hand."""

from __future__ import annotations

import pytest

from fpn_plugin.benchmark.scaling import MB, Network, Part, buckets, last_efficient, step_time

LINK = Network(bandwidth=1e9, latency=1e-5, between=1e8, latency_between=1e-4, per_host=2)


def test_a_ring_within_a_host_and_between_hosts() -> None:
    assert LINK.all_reduce(1, 1e9) == 0
    assert LINK.all_reduce(2, 1e9) == pytest.approx(1.0 + 2e-5)
    # 4 processes of 2 hosts: 1.5 times the bytes on the slow link, 6 messages of mixed latency
    assert LINK.all_reduce(4, 1e8) == pytest.approx(1.5 + 6 * (2e-4 + 2e-5) / 4)


def test_buckets_fill_from_the_losses_on() -> None:
    network, head = Part(10 * MB, 1.0, 2.0), Part(MB // 4, 1.0, 1.0)
    made = buckets([network, head])
    assert [size for size, _ in made] == [MB, 25 * MB, 15 * MB]
    assert [ready for _, ready in made] == pytest.approx([1.0, 1.0 + 2.0 * 0.625, 3.0])
    assert [size for size, _ in buckets([network, head], bytes_each=2)][0] == MB // 2


def test_what_the_backward_pass_hides_costs_nothing_but_the_last_bucket() -> None:
    parts = [Part(MB // 4, 1.0, 2.0), Part(MB // 4, 1.0, 2.0)]
    alone, pair = (step_time(parts, n, LINK) for n in (1, 2))
    assert alone.seconds == 6.0
    assert pair.exposed == pytest.approx(LINK.all_reduce(2, MB))
    assert step_time(parts, 2, LINK, overlaps=False).exposed == pytest.approx(
        2 * LINK.all_reduce(2, MB)
    )
    normed = step_time([Part(1, 1.0, 2.0, sync_norms=3)], 2, LINK)
    assert normed.norms == pytest.approx(6 * LINK.all_reduce(2, 2048))
    assert step_time(parts, 2, LINK, data=10.0).seconds == pytest.approx(10.0)
    assert step_time(parts, 2, LINK, steps=4).exposed == pytest.approx(pair.exposed)
    times = {n: step_time([Part(100 * MB, 0.1, 0.2)], n, LINK) for n in (1, 2, 4)}
    assert last_efficient(times) == 1 and last_efficient(times, 0.01) == 4
