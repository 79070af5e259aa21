import itertools
import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from papilio.sharding.calibration import collectives
from papilio.sharding.calibration.fit import fit_line, fit_relative, fit_robust, nnls
from papilio.sharding.calibration.kernels import Case, KernelTiming, cases, fit_kernels
from papilio.sharding.calibration.overheads import OVERHEADS, PARTS, StepTiming, fit_overheads
from papilio.sharding.calibration.profile_file import add_rates, hardware_from_values, write_hardware
from papilio.sharding.hardware import RATE_NAMES, HardwareError, KernelRates, load_hardware, rates_from
from papilio.sharding.planner.cost import kernel_s, touched_row_bytes


def best_by_trying_all(matrix: np.ndarray, targets: np.ndarray) -> float:
    """The least residual over all sets of free columns whose solution has no negative entry."""
    best = float(np.linalg.norm(targets))
    for count in range(1, matrix.shape[1] + 1):
        for columns in itertools.combinations(range(matrix.shape[1]), count):
            chosen = matrix[:, columns]
            solution = np.linalg.lstsq(chosen, targets, rcond=None)[0]
            if (solution >= 0).all():
                best = min(best, float(np.linalg.norm(chosen @ solution - targets)))
    return best


@pytest.mark.parametrize("seed", range(20))
def test_nnls_is_as_good_as_trying_every_set_of_columns(seed: int) -> None:
    generator = np.random.default_rng(seed)
    matrix, targets = generator.normal(size=(9, 5)), generator.normal(size=9)
    solution = nnls(matrix, targets)
    assert (solution >= 0).all()
    assert np.linalg.norm(matrix @ solution - targets) == pytest.approx(best_by_trying_all(matrix, targets))


def test_relative_fit_gives_back_figures_of_very_different_size() -> None:
    generator = np.random.default_rng(0)
    terms = generator.uniform(size=(20, 3)) * [1.0, 1e6, 1e9]
    truth = np.array([3e-3, 2e-9, 0.0])
    assert fit_relative(terms, terms @ truth) == pytest.approx(truth, rel=1e-6, abs=1e-18)


def test_a_prior_decides_where_measurements_do_not() -> None:
    terms = np.array([[1.0, 1.0], [2.0, 2.0]])
    fitted = fit_relative(terms, np.array([3.0, 6.0]), np.array([1.0, 2.0]), 0.1)
    assert fitted == pytest.approx([1.0, 2.0], rel=1e-3)


def test_a_line_is_found() -> None:
    assert fit_line([10, 100, 1000], [2.5, 7.0, 52.0]) == pytest.approx((2.0, 0.05))


def test_a_disturbed_measurement_hardly_counts() -> None:
    terms = np.array([[1.0, float(size)] for size in range(1, 21)])
    truth = np.array([5.0, 1.0])
    seconds = terms @ truth
    seconds[[3, 12]] *= 2
    nothing_known = np.full(2, np.nan)
    plain, robust = (fit(terms, seconds, nothing_known, 0.1) for fit in (fit_relative, fit_robust))
    assert np.abs(robust / truth - 1).max() < 0.03 < np.abs(plain / truth - 1).max()


@pytest.mark.parametrize("optimizer", ["sgd", "rowwise_adagrad", "adagrad"])
def test_kernel_figures_are_found_again_from_the_times_they_give(optimizer: str) -> None:
    lookup = KernelRates(2e-9, 4e10, 1e-8, 5e10, 1e10, 5e9)
    update = KernelRates(8e-9, 2e10, 0.0, 4e10, 4e9, 2e9)

    def time_of(kernel: KernelRates, case: Case, state_of: str) -> float:
        return 5e-5 + case.num_tables * kernel_s(
            kernel,
            num_rows=case.num_rows,
            num_columns=case.num_columns,
            num_ids=case.batch_size * case.pooling_factor,
            num_bags=case.batch_size,
            row_bytes=4 * case.num_columns,
            touched_bytes=touched_row_bytes(4, case.num_columns, state_of),
        )

    found = cases("rowwise_adagrad", is_quick=False)
    timings = [KernelTiming(case, time_of(lookup, case, ""), time_of(update, case, optimizer)) for case in found]
    figures = fit_kernels({optimizer: timings})
    rates = rates_from(dict.fromkeys(RATE_NAMES, 1.0) | figures)
    for case in found:
        assert time_of(rates.lookup, case, "") == pytest.approx(time_of(lookup, case, ""), rel=1e-3)
        assert time_of(rates.update(optimizer), case, optimizer) == pytest.approx(
            time_of(update, case, optimizer), rel=1e-3
        )


def test_overheads_and_stretches_are_found_again() -> None:
    generator = np.random.default_rng(1)
    figures = {"lookup_row_s": 1e-9, "lookup_bytes_per_s": 1e9, "matmul_fp32_flops_per_s": 1e11}
    figures |= dict.fromkeys(OVERHEADS, 0.0)
    timings = []
    for _ in range(40):
        parts = {part: float(generator.uniform(1e-3, 1e-2)) for part in PARTS}
        terms = {name: float(generator.uniform(1, 10)) for name in OVERHEADS}
        seconds = sum(parts.values()) + 0.5 * parts["dense"] + 2e-3 * terms["step_s"] + 1e-3 * terms["table_s"]
        timings.append(StepTiming(seconds, parts, terms))
    fitted = fit_overheads(timings, figures)
    assert fitted["step_s"] == pytest.approx(2e-3, rel=0.02)
    assert fitted["table_s"] == pytest.approx(1e-3, rel=0.05)
    assert fitted["matmul_fp32_flops_per_s"] == pytest.approx(1e11 / 1.5, rel=0.1)
    assert fitted["lookup_row_s"] == pytest.approx(1e-9, rel=0.15)


def values() -> dict[str, float]:
    return {name: 0.5 if name == "overlap" else 123.456e6 for name in RATE_NAMES} | {"step_s": 1.5e-3, "id_s": 2.5e-8}


def test_a_measured_profile_is_read_back(tmp_path: Path) -> None:
    path = str(tmp_path / "new" / "machine.toml")
    write_hardware(hardware_from_values("cpu", 2, values(), 3 * 2.0**20), path)
    hardware = load_hardware(path)
    assert hardware.framework_memory.si == 3 * 2**20
    assert hardware.rates[0].values() == pytest.approx(values(), rel=1e-4)
    assert (hardware.rates[0].figures["step_s"].value, hardware.rates[0].figures["step_s"].unit) == (1.5, "ms")
    assert not Path(f"{path}.part").exists()


def test_rates_of_another_number_of_ranks_are_added(tmp_path: Path) -> None:
    path = str(tmp_path / "machine.toml")
    for num_ranks in (4, 1, 4):
        measured = hardware_from_values("cpu", num_ranks, values() | {"step_s": num_ranks * 1e-3}, 0.0)
        write_hardware(add_rates(path, measured), path)
    hardware = load_hardware(path)
    assert [entry.ranks_per_host for entry in hardware.rates] == [1, 4]
    assert hardware.rates_of(3).step_s == pytest.approx(4e-3)


@pytest.mark.parametrize(("num_cores", "usual"), [(1, 1), (2, 2), (3, 2), (64, 4)])
def test_a_job_of_a_calibrated_host_has_a_core_for_each_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_cores: int, usual: int
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: num_cores)
    path = str(tmp_path / "machine.toml")
    for num_ranks in (1, 2, 4):
        write_hardware(add_rates(path, hardware_from_values("cpu", num_ranks, values(), 0.0)), path)
    hardware = load_hardware(path)
    assert (hardware.ranks_per_host, hardware.host_cores.si) == (usual, num_cores)


def test_two_devices_do_not_share_a_file(tmp_path: Path) -> None:
    path = str(tmp_path / "machine.toml")
    measured = hardware_from_values("cpu", 1, values(), 0.0)
    write_hardware(measured.model_copy(update={"device": "cuda"}), path)
    with pytest.raises(HardwareError, match="describes a cuda machine; give --output another file"):
        add_rates(path, measured)


def test_cases_reach_beyond_every_cache_and_into_the_nearest() -> None:
    for optimizer in ("sgd", "rowwise_adagrad"):
        sizes = [4 * case.num_rows * case.num_columns for case in cases(optimizer, is_quick=False)]
        assert min(sizes) < 1 << 18
        assert max(sizes) > 1 << 27


def test_one_rank_has_nothing_to_send() -> None:
    assert collectives.SIZES_BYTES[0] < collectives.SIZES_BYTES[-1]
    kernel = replace(KernelRates(0.0, math.inf), row_s=1.0)
    assert kernel_s(kernel, num_rows=5, num_columns=4, num_ids=0, num_bags=3, row_bytes=16, touched_bytes=80) == 0
