"""Format "fastest": what is measured, what is refused, and what is chosen; backends stand in for compiled ones."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import pytest
import torch

from papilio.trainer.inference.backends import cpu_backends, fastest
from papilio.trainer.inference.backends.build_format import describe_format
from papilio.trainer.inference.backends.cpu_backends import BACKENDS, Backend, load_eager
from papilio.trainer.inference.backends.fastest import choose_ways, time_ways
from papilio.trainer.inference.backends.flat_model import build_flat_model
from papilio.trainer.inference.backends.format_folder import format_path
from papilio.trainer.inference.backends.opening import build_format, open_format, open_predictor
from papilio.trainer.inference.export.export_options import ExportOptions
from papilio.trainer.inference.export.exporter import export_package
from papilio.trainer.inference.package.format import PackageError, read_package
from papilio.trainer.inference.scorer import Formats, load_scorer
from tests.support.datasets import ROWS_PER_TABLE, edit_manifest, write_dataset
from tests.support.package_bytes import rewrite_format
from tests.support.trained_runs import write_run

SIZES = (1, 8)


@pytest.fixture
def package(tmp_path):
    data = write_dataset(tmp_path / "data", split_rows={"train": 30, "test": 600})
    run, _ = write_run(tmp_path / "run", data)
    return export_package(run, str(tmp_path / "package"), ExportOptions(has_gate=False))


def write_nothing(package, folder):
    Path(folder, "here").touch()


def changed(change):
    """A backend that changes the eager model's answers."""

    def load(package, folder):
        assert Path(folder, "here").exists()
        run = load_eager(package)

        def answer(dense, ids, lengths):
            probabilities, num_unknown = run(dense, ids, lengths)
            return change(probabilities), num_unknown

        return answer

    return Backend("bf16", write_nothing, load)


@pytest.fixture
def few_backends(monkeypatch):
    """The eager backend, one that rounds a little, and one whose probabilities are far too small."""
    found = {
        "eager": BACKENDS["eager"],
        "near": changed(lambda p: p + 1e-6),
        "far": changed(lambda p: p * 1e-6),
    }
    for module in (fastest, cpu_backends, fastest.accuracy):
        monkeypatch.setattr(module, "BACKENDS", found)
    monkeypatch.setattr(fastest, "BATCH_SIZES", SIZES)
    monkeypatch.setattr(fastest, "time_ways", pretended_times)
    return found


def pretended_times(runs, batches_of, sizes, clock):
    """The eager backend is the fastest for one sample, the near one for more; all are run once."""
    for run in runs.values():
        run(*batches_of(3)[0])
    seconds = {"eager": {1: 1e-3, 8: 4e-3}, "near": {1: 2e-3, 8: 2e-3}, "far": {1: 1e-6, 8: 1e-6}}
    return {name: seconds[name] for name in runs}


def test_ways_that_answer_worse_are_not_chosen_however_fast(package, few_backends) -> None:
    info = build_format(package, "fastest")
    choice = info.choice
    assert choice.up_to == ((1, "eager"), (8, "near"))
    assert choice.num_samples == 600 and choice.held_out.startswith("600 samples of split test of")
    far = choice.ways["far"]
    assert far.ne_ratio > 2 and far.refusal.startswith("has ")
    assert far.refusal.endswith("times the trained model's normalized entropy, more than 1.001")
    near = choice.ways["near"]
    assert near.refusal is None and near.median_ms == {"1": 2.0, "8": 2.0}
    assert near.max_difference == pytest.approx(1e-6, rel=0.1) and near.auc_ratio == pytest.approx(1, abs=1e-4)
    assert sorted(os.listdir(format_path(package, "fastest"))) == ["eager", "format.json", "near"]
    lines = describe_format(info, "pkg", 1.0)
    assert [line.split()[0] for line in lines[3:]] == ["eager", "near", "far"]
    assert lines[3].endswith("exact   1 to 1") and lines[4].endswith("%   2 and more")


def test_a_request_takes_the_way_of_its_size(package, few_backends) -> None:
    build_format(package, "fastest")
    predictor, model = open_predictor(package), build_flat_model(package)
    assert predictor.format_name == "fastest"
    for num_samples in (0, 1, 2, 8, 9, 100):
        ids = torch.arange(3 * num_samples, dtype=torch.int32) % min(ROWS_PER_TABLE.values())
        request = torch.ones(num_samples, 3), ids, torch.ones(3 * num_samples, dtype=torch.int32)
        added = 1e-6 if num_samples > 1 else 0.0
        torch.testing.assert_close(predictor.predict(*request), model(*request) + added, rtol=0, atol=1e-8)


def test_what_the_export_lost_counts_too(package, few_backends) -> None:
    """A package with 1.0009 times the trained model's entropy may add .0001, not another .001."""
    figures = {"auc_ratio": 1.0, "ne_ratio": 1.0009, "min_auc_ratio": 0.999}
    certified = package.manifest.model_copy(update={"certified": figures})
    Path(package.folder, "here").touch()
    runs = {"near": changed(lambda p: p * 0.995).load(package, package.folder)}
    held_out = fastest._held_out(package, package.manifest.source.data)
    model = build_flat_model(package)
    alone = fastest.accuracy.measure(model, runs, held_out, package.manifest)["near"]
    together = fastest.accuracy.measure(model, runs, held_out, certified)["near"]
    assert alone.ne_ratio == together.ne_ratio
    assert 1.0001 < alone.ne_ratio < 1.001 and alone.refusal is None
    assert together.refusal.startswith("has 1.00")


def test_without_held_out_data_only_exact_ways_are_built(package, few_backends, tmp_path) -> None:
    with pytest.raises(
        PackageError, match=r"coarser than fp32 is measured on held-out data first.*--data DIR, or build"
    ):
        build_format(package, "fastest", data=str(tmp_path / "nowhere"))
    assert not Path(package.folder, "formats", "fastest").exists()
    choice = build_format(package, "fastest", data=str(tmp_path / "nowhere"), dense="fp32").choice
    assert list(choice.ways) == ["eager"] and choice.num_samples == 0 and choice.held_out is None


def test_other_data_is_refused(package, few_backends, tmp_path) -> None:
    other = write_dataset(tmp_path / "other")
    edit_manifest(other, '"x0"', '"y0"')
    with pytest.raises(PackageError, match=r"differs from that of .* in: columns; its ids would look up wrong rows"):
        build_format(package, "fastest", data=other)


def test_a_machine_that_lacks_something_goes_without_that_way(package, few_backends) -> None:
    few_backends["near"] = Backend("bf16", write_nothing, few_backends["near"].load, needs=("no_such_library",))
    choice = build_format(package, "fastest").choice
    assert choice.ways["near"].refusal == "no_such_library is not installed"
    assert choice.up_to == ((8, "eager"),)


def test_a_choice_that_does_not_fit_here_is_left_with_a_warning(package, few_backends, caplog) -> None:
    build_format(package, "fastest")
    path = Path(format_path(package, "fastest", "format.json"))
    info = json.loads(path.read_text())
    rewrite_format(package.folder, "fastest", choice={**info["choice"], "num_threads": 77})
    with caplog.at_level(logging.WARNING):
        open_format(package, "fastest", trusts_formats=True)
    assert "were chosen with 77 threads, here are" in caplog.text
    rewrite_format(package.folder, "fastest", needs={"torch": "1.0", "fbgemm_gpu": "1.0"})
    with pytest.raises(PackageError, match=r"compiled for torch 1.0"):
        open_format(package, "fastest")
    with caplog.at_level(logging.WARNING):
        assert open_predictor(package).format_name == "eager"
    assert "the package is used without it: slower, and its dense part in fp32" in caplog.text


def test_choices_follow_the_times_and_do_not_change_for_noise() -> None:
    times = {"a": {1: 1.0, 2: 2.0, 4: 4.0}, "b": {1: 1.5, 2: 1.99, 4: 2.0}, "c": {4: 1.99}}
    assert choose_ways(times) == [(2, "a"), (4, "c")]
    assert choose_ways({"a": {1: 1.0, 2: 1.0}}) == [(2, "a")]


def test_a_way_that_falls_behind_more_and_more_is_not_timed_at_larger_sizes() -> None:
    sizes = (1, 2, 4, 8)
    seconds = {"fast": [1, 1, 1, 1], "late": [60, 20, 3, 0.5], "slow": [10, 60, 60, 60]}
    now_s = 0.0

    def backend(name):
        def run(size):
            nonlocal now_s
            now_s += seconds[name][sizes.index(size)]

        return run

    runs = {name: backend(name) for name in seconds}
    times = time_ways(runs, lambda size: [(size,), (size,)], sizes, clock=lambda: now_s)
    assert times["fast"] == dict.fromkeys(sizes, 1)
    assert times["late"] == dict(zip(sizes, seconds["late"], strict=True))
    assert times["slow"] == {1: 10, 2: 60}
    assert choose_ways(times) == [(4, "fast"), (8, "late")]


def test_a_format_of_others_is_left_with_one_line_or_refused(
    package, few_backends, caplog, monkeypatch, tmp_path
) -> None:
    build_format(package, "fastest")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "of_another_user"))
    with caplog.at_level(logging.WARNING):
        assert load_scorer(package.folder, formats=Formats("if_fit")).form == "eager"
    (line,) = [r.getMessage() for r in caplog.records if "not built by this user" in r.getMessage()]
    assert "--trust-formats" in line and "\n" not in line
    with pytest.raises(PackageError, match="was not built by this user on this machine"):
        load_scorer(package.folder, formats=Formats("always"))
    assert load_scorer(package.folder, formats=Formats("always", are_trusted=True)).form == "fastest"
    with pytest.raises(PackageError, match="was not built by this user on this machine"):
        open_format(package, "fastest")


def test_a_damaged_package_is_not_built_upon(package, few_backends) -> None:
    path = Path(package.path("tables.bin"))
    raw = bytearray(path.read_bytes())
    raw[7] ^= 1
    path.write_bytes(raw)
    with pytest.raises(PackageError, match=r"tables.bin is damaged: its checksum is not .*; export"):
        build_format(read_package(package.folder), "fastest")
    assert not Path(package.folder, "formats").exists()
