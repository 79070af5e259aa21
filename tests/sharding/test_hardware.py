import math
from pathlib import Path

import pytest

from papilio.sharding.calibration.profile_file import to_toml
from papilio.sharding.hardware import Hardware, HardwareError, KernelRates, load_hardware, profile_names

GPU_PROFILES = ["big_basin_p100", "big_basin_v100", "dgx_a100", "dgx_b200", "dgx_h100", "dgx_h200"]


def edited(tmp_path: Path, old: str, new: str) -> str:
    """A copy of a shipped profile with one text replaced."""
    text = to_toml(load_hardware("dgx_a100"))
    assert old in text
    path = tmp_path / "edited.toml"
    path.write_text(text.replace(old, new, 1))
    return str(path)


@pytest.mark.parametrize("name", profile_names())
def test_every_profile_can_be_read_and_says_where_its_figures_come_from(name: str) -> None:
    hardware = load_hardware(name)
    assert hardware.name == name
    for entry in hardware.rates:
        rates = hardware.rates_of(entry.ranks_per_host)
        assert 1e9 < rates.memory_bytes_per_s < 1e13
        assert 1e10 < rates.matmul_fp32_flops_per_s < 1e15
        assert 0 <= rates.overlap <= 1
        for figure in [*entry.figures.values(), *entry.achieved.values()]:
            assert len(figure.source) > 5
        assert all(0 < share.si <= 1 for share in entry.achieved.values())


def test_gpu_profiles_are_all_there_and_newer_ones_are_faster() -> None:
    assert set(GPU_PROFILES) <= set(profile_names())
    speeds = [
        load_hardware(name).rates_of(8).memory_bytes_per_s
        for name in ("big_basin_p100", "big_basin_v100", "dgx_a100", "dgx_h100", "dgx_h200", "dgx_b200")
    ]
    assert speeds == sorted(speeds)


def test_what_is_reached_is_the_peak_times_the_achieved_share() -> None:
    hardware = load_hardware("dgx_a100")
    entry = hardware.rates[0]
    assert entry.figures["memory_bytes_per_s"].si == 2039e9
    assert hardware.rates_of(8).memory_bytes_per_s == pytest.approx(2039e9 * 0.8)


def test_the_nearest_number_of_busy_ranks_counts() -> None:
    hardware = load_hardware("dgx_a100")
    slow = hardware.rates[0].model_copy(update={"ranks_per_host": 2, "achieved": {}})
    both = Hardware.model_validate({**hardware.model_dump(), "rates": [hardware.rates[0], slow]})
    assert both.rates_of(1).memory_bytes_per_s == 2039e9
    assert both.rates_of(7).memory_bytes_per_s == pytest.approx(2039e9 * 0.8)


def test_optimizers_without_figures_of_their_own_take_the_common_ones() -> None:
    rates = load_hardware("dgx_a100").rates_of(8)
    assert rates.update("adam") == rates.update("sgd") == rates.updates[""]


def test_touch_times_are_interpolated_over_the_logarithm_of_the_size() -> None:
    kernel = KernelRates(0.0, math.inf, 0.0, 1e9, 5e8, 2.5e8)
    assert kernel.touch_s_per_byte(1 << 20) == pytest.approx(1e-9)
    assert kernel.touch_s_per_byte(32 << 20) == pytest.approx(2e-9)
    assert kernel.touch_s_per_byte(1 << 40) == pytest.approx(4e-9)
    # 2^22.5 is halfway between 2^20 and 2^25.
    assert kernel.touch_s_per_byte(2**22.5) == pytest.approx(1.5e-9)
    assert kernel.touch_s_per_byte(1 << 19) == pytest.approx(0.5e-9)
    assert KernelRates(0.0, math.inf).touch_s_per_byte(1 << 30) == 0.0


def test_a_wrong_name_is_told_the_nearest() -> None:
    with pytest.raises(HardwareError, match=r"hardware dgx_h10: no such profile or file; did you mean dgx_h100\?"):
        load_hardware("dgx_h10")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("format_version = 1", "format_version = 9", "has format version 9; this Papilio reads 1"),
        ('unit = "TFLOP/s"', 'unit = "HP"', "matmul_fp32_flops_per_s has unit 'HP'; it is operations per second: "
         "FLOP/s, GFLOP/s, TFLOP/s"),
        ("\nlayer_s", "\nlayers_s", "rates of 8 ranks a host: layer_s is missing; layers_s is unknown"),
        ('device = "cuda"', 'device = "tpu"', "device: Input should be 'cpu' or 'cuda'"),
        ("ranks_per_host = 8", "ranks_per_host =", "not a TOML file"),
        ("[rates.achieved]", "[rates.achieved]\nspeed = { value = 1, unit = '1', source = 'none', date = '2026' }",
         "achieved.speed is a share of no figure"),
        # A bandwidth in seconds, a rate of nothing, of everything, a share above all, a machine without memory.
        ('memory_bytes_per_s = { value = 2039.0, unit = "GB/s"', 'memory_bytes_per_s = { value = 2039.0, unit = "s"',
         "rates of 8 ranks a host: memory_bytes_per_s has unit 's'; it is bytes per second: B/s, MB/s, GB/s, TB/s"),
        ("memory_bytes_per_s = { value = 2039.0,", "memory_bytes_per_s = { value = 0,",
         "memory_bytes_per_s is 0 GB/s; it must be more than 0"),
        ("memory_bytes_per_s = { value = 2039.0,", "memory_bytes_per_s = { value = inf,",
         "memory_bytes_per_s.value: Input should be a finite number"),
        ("memory_bytes_per_s = { value = 2039.0,", "memory_bytes_per_s = { value = nan,",
         "memory_bytes_per_s.value: Input should be"),
        ("overlap = { value = 0.5", "overlap = { value = 7", "overlap is 7; it must be at least 0 and at most 1"),
        ("device_memory = { value = 80", "device_memory = { value = 0",
         "device_memory is 0 GiB; it must be more than 0"),
    ],
)  # fmt: skip
def test_a_damaged_profile_is_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(HardwareError) as caught:
        load_hardware(edited(tmp_path, old, new))
    assert message in str(caught.value)


def test_a_profile_survives_being_written(tmp_path: Path) -> None:
    hardware = load_hardware("big_basin_v100")
    path = tmp_path / "again.toml"
    path.write_text(to_toml(hardware))
    assert load_hardware(str(path)) == hardware


def test_cpu_ranks_share_the_hosts_memory() -> None:
    hardware = load_hardware("dgx_a100")
    assert hardware.device_memory_bytes(4) == 80 * 2**30
    assert hardware.model_copy(update={"device": "cpu"}).device_memory_bytes(4) == 20 * 2**30


def test_rates_of_every_number_of_ranks_are_checked(tmp_path: Path) -> None:
    hardware = load_hardware("dgx_a100")
    wrong = hardware.rates[0].model_dump()
    wrong["figures"]["overlap"]["value"] = 3.0
    both = Hardware.model_validate(
        {**hardware.model_dump(), "rates": [{**wrong, "ranks_per_host": 2}, hardware.rates[0]]}
    )
    path = tmp_path / "both.toml"
    path.write_text(to_toml(both))
    with pytest.raises(
        HardwareError, match="rates of 2 ranks a host: overlap is 3; it must be at least 0 and at most 1"
    ):
        load_hardware(str(path))


def test_a_file_that_cannot_be_parsed_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "deep.toml"
    path.write_text("a = " + "[" * 100_000)
    with pytest.raises(HardwareError, match=r"deep.toml: not a"):
        load_hardware(str(path))
