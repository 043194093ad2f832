"""The model of what sending takes: fitted to times, it tells those of other processes."""

import pytest

from tools.communication import SIZES, Transport, fit


def test_the_fit_finds_what_made_the_times():
    made = Transport(latency=20e-6, bandwidth=1e9)
    times = [made.seconds(4, 1, size) for size in SIZES]
    found = fit(SIZES, times, 4)
    assert found.latency == pytest.approx(made.latency)
    assert found.bandwidth == pytest.approx(made.bandwidth)
    assert found.seconds(8, 3, 10**6) == pytest.approx(2 * 7 * (3 * 20e-6 + 10**6 / 8 / 1e9))


def test_one_process_sends_nothing_and_no_time_is_below_zero():
    assert Transport(1.0, 1.0).seconds(1, 5, 10**9) == 0
    assert fit(SIZES, [size / 1e9 - 1e-5 for size in SIZES], 2).latency == 0
