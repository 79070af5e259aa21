"""Formats of a package, each in a process that has no torchrec, against the formulas and against the eager model."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from papilio.launch.cli import main
from papilio.trainer.inference.backends.aoti import has_compiler
from papilio.trainer.inference.backends.dense_backends import for_many_samples, for_one_sample
from papilio.trainer.inference.backends.flat_model import build_dense_of, build_device_model, build_flat_model
from papilio.trainer.inference.backends.format_folder import format_path, verify_formats
from papilio.trainer.inference.backends.opening import build_format, open_format, open_predictor
from papilio.trainer.inference.backends.predictor import TensorError
from papilio.trainer.inference.export.export_options import ExportOptions
from papilio.trainer.inference.export.exporter import export_package
from papilio.trainer.inference.package.format import PackageError
from tests.support.datasets import write_dataset
from tests.support.package_bytes import read_tables, rewrite_format
from tests.support.trained_runs import expected_probabilities, make_config, write_run

REPOSITORY = Path(__file__).resolve().parents[4]
NAMES = ("dense", "ids", "lengths")
MEAN = {"m": "mean"}
# (samples, ids of a bag) of the requests; None is bags of 0 to 3 ids.
SIZES = ((0, None), (1, None), (1, 0), (1, 1), (7, None), (7, 0), (2048, 1), (2048, None))


def make_package(folder, architecture="dlrm"):
    data = write_dataset(folder / "data")
    model = {"architecture": architecture, "table_pooling": MEAN, "dcn_num_layers": 2, "dcn_low_rank_dim": 3}
    run, tensors = write_run(folder / "run", data, **model)
    tables = (("t_b", "int4"), ("t_m", "fp16"))
    package = export_package(run, str(folder / "package"), ExportOptions(tables=tables, has_gate=False))
    return package, tensors, make_config(data, **model)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_package(tmp_path_factory.mktemp("dlrm"))


@pytest.fixture(scope="module")
def package(made):
    return made[0]


def require(name):
    if name == "aoti" and not has_compiler():
        pytest.skip("no C++ compiler")
    for library in ("onnx", "onnxscript", "onnxruntime") if name == "onnx" else ():
        if importlib.util.find_spec(library) is None:
            pytest.skip(f'{library} is not installed: pip install "papilio[onnx]"')


@pytest.fixture
def own(tmp_path):
    """A package of one test's own, with its portable program built."""
    package, _, _ = make_package(tmp_path)
    build_format(package, "torch")
    return package


@pytest.fixture(scope="module")
def built(package):
    """Build a format once for all tests of this file."""
    names = set()

    def build(name):
        require(name)
        if name not in names:
            build_format(package, name)
            names.add(name)
        return name

    return build


def make_requests(package, seed=0):
    """Requests of all sizes, a tenth of the ids out of range, both ways."""
    generator = np.random.default_rng(seed)
    requests = []
    for num_samples, bag_ids in SIZES:
        lengths, ids = [], []
        for table in package.manifest.tables:
            of_table = generator.integers(0, 4, num_samples) if bag_ids is None else np.full(num_samples, bag_ids)
            known = generator.integers(0, table.rows, of_table.sum())
            beyond = generator.choice([-1, -(2**31), table.rows, table.rows + 5, 2**31 - 1], len(known))
            ids.append(np.where(generator.random(len(known)) < 0.1, beyond, known))
            lengths.append(of_table)
        dense = generator.normal(size=(num_samples, len(package.manifest.dense_features)))
        parts = (
            dense.astype(np.float32),
            np.concatenate(ids).astype(np.int32),
            np.concatenate(lengths).astype(np.int32),
        )
        requests.append(parts)
    return requests


def num_unknown(package, ids, lengths):
    tables = package.manifest.tables
    rows = np.repeat([table.rows for table in tables], lengths.reshape(len(tables), -1).sum(1))
    return int(np.count_nonzero((ids < 0) | (ids >= rows)))


def run_python(*words, **environment):
    return subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **environment},
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )


@pytest.mark.parametrize("name", ["aoti", "torch", "onnx"])
def test_a_format_answers_in_a_process_without_torchrec(made, built, name, tmp_path) -> None:
    package, tensors, config = made
    requests = make_requests(package)
    named = {f"{n}_{i}": v for i, parts in enumerate(requests) for n, v in zip(NAMES, parts, strict=True)}
    np.savez(tmp_path / "requests.npz", **named)
    built(name)
    files = (tmp_path / "requests.npz", tmp_path / "answers.npz")
    run_python("-m", "tests.support.format_process", package.folder, name, *files)
    answers = np.load(files[1])
    model = build_flat_model(package)
    tables = read_tables(package.folder)
    by_feature = {table.feature: tables[table.name] for table in package.manifest.tables}
    for number, (dense, ids, lengths) in enumerate(requests):
        found = answers[f"answer_{number}"]
        assert found.shape == (len(dense),) and found.dtype == np.float32
        assert answers[f"unknown_{number}"] == num_unknown(package, ids, lengths)
        if len(dense):
            eager = model(*map(torch.from_numpy, (dense, ids, lengths))).numpy()
            np.testing.assert_allclose(found, eager, rtol=0, atol=1e-6)
        if 0 < len(dense) < 100:
            expected = expected_probabilities(config, by_feature, tensors, dense, ids, lengths)
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    # The compiled model reads the package's own file and copies nothing of it; the others hold tables of their own.
    assert answers["private_table_bytes"] == (0 if name == "aoti" else -1)


@pytest.mark.parametrize("name", ["torch", "onnx"])
def test_a_portable_format_needs_nothing_of_ours(package, built, name, tmp_path) -> None:
    dense, ids, lengths = make_requests(package)[4]
    np.savez(tmp_path / "request.npz", dense=dense, ids=ids, lengths=lengths)
    built(name)
    torch_program = """
import torch
module = torch.export.load(sys.argv[1] + "/model.pt2").module()
answer, unknown = (tensor.numpy() for tensor in module(*(torch.from_numpy(request[name]) for name in NAMES)))
"""
    onnx_model = """
import onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1] + "/model.onnx", providers=["CPUExecutionProvider"])
answer, unknown = session.run(["probabilities", "num_unknown_ids"], {name: request[name] for name in NAMES})
"""
    script = f"""
import sys
import numpy as np
NAMES = ("dense", "ids", "lengths")
request = np.load(sys.argv[2])
{torch_program if name == "torch" else onnx_model}
assert not {{"fbgemm_gpu", "torchrec", "trainer"}} & set(sys.modules)
np.savez(sys.argv[3], answer=answer, unknown=unknown)
"""
    files = (tmp_path / "request.npz", tmp_path / "answer.npz")
    run_python("-c", script, format_path(package, name), *files, PYTHONPATH="")
    found = np.load(files[1])
    eager = build_flat_model(package)(*map(torch.from_numpy, (dense, ids, lengths))).numpy()
    np.testing.assert_allclose(found["answer"], eager, rtol=0, atol=1e-6)
    assert found["unknown"] == num_unknown(package, ids, lengths) > 0


def test_onnx_has_no_operators_but_its_own(package, built) -> None:
    built("onnx")
    import onnx

    model = onnx.load(format_path(package, "onnx", "model.onnx"), load_external_data=False)
    assert {node.domain for node in model.graph.node} == {""}
    onnx.checker.check_model(format_path(package, "onnx", "model.onnx"))


def test_cross_layers_have_formats_too(tmp_path) -> None:
    package, _, _ = make_package(tmp_path, "dlrm_dcnv2")
    build_format(package, "torch")
    predictor, model = open_format(package, "torch"), build_flat_model(package)
    for parts in make_requests(package)[1:]:
        request = [torch.from_numpy(part) for part in parts]
        torch.testing.assert_close(predictor.predict(*request), model(*request), rtol=0, atol=1e-6)


@pytest.mark.parametrize("architecture", ["dlrm", "dlrm_dcnv2"])
def test_rounded_dense_parts_are_near_the_exact_one(architecture, tmp_path) -> None:
    """Weights of bf16 have 8 bits: products of a few layers keep two digits."""
    package, _, _ = make_package(tmp_path, architecture)
    generator = torch.Generator().manual_seed(0)
    dense, pooled = torch.randn(9, 3, generator=generator), torch.randn(9, 3, 8, generator=generator)
    exact = build_dense_of(package)(dense, pooled)
    for change in (for_many_samples, for_one_sample):
        rounded = change(build_dense_of(package))(dense, pooled)
        assert rounded.dtype == torch.float32 and not torch.equal(rounded, exact)
        torch.testing.assert_close(rounded, exact, rtol=0.03, atol=0.03 * float(exact.abs().max()))


def test_tables_with_padded_rows_as_on_a_device_give_the_same(package) -> None:
    model, padded = build_flat_model(package), build_device_model(package, torch.device("cpu"))
    for parts in make_requests(package):
        request = [torch.from_numpy(part) for part in parts]
        torch.testing.assert_close(padded(*request), model(*request), rtol=0, atol=0)


def test_requests_that_do_not_fit_are_refused_and_nothing_is_read(package) -> None:
    predictor = open_predictor(package)
    dense, ids, lengths = (torch.from_numpy(part) for part in make_requests(package)[4])
    with pytest.raises(TensorError, match=r"dense must be float32 of shape \[samples, 3\]; it is float64 of shape \[7"):
        predictor.predict(dense.double(), ids, lengths)
    with pytest.raises(TensorError, match=r"ids must be int32 or int64 with one dimension; it is float32"):
        predictor.predict(dense, ids.float(), lengths)
    with pytest.raises(TensorError, match=r"lengths must have 21 entries, one for each of 3 features of each of 7"):
        predictor.predict(dense, ids, lengths[1:])
    with pytest.raises(TensorError, match=rf"add up to the number of ids, {len(ids)}; they add up to {len(ids) + 1}"):
        predictor.predict(dense, ids, torch.cat([lengths[:1] + 1, lengths[1:]]))
    with pytest.raises(TensorError, match=r"the smallest is -1"):
        predictor.predict(dense, ids, torch.cat([-torch.ones(1, dtype=torch.int32), lengths[1:]]))
    wide = ids.long()
    wide[0] = 2**40
    ids[0] = -1
    torch.testing.assert_close(predictor.predict(dense, wide, lengths), predictor.predict(dense, ids, lengths))


def test_a_machine_without_a_compiler_is_told_what_to_do(own, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(
        PackageError, match=r"needs a C\+\+ compiler and finds none; install one .* or use --format torch"
    ):
        build_format(own, "aoti")
    assert os.listdir(Path(own.folder, "formats")) == ["torch"]


def test_a_machine_without_onnx_is_told_what_to_install(own, monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PackageError, match=r'ONNX needs onnx, which is not installed: pip install "papilio\[onnx\]"'):
        build_format(own, "onnx")


def test_a_format_that_was_not_built_is_named_with_the_command(package) -> None:
    with pytest.raises(PackageError, match=r"has no format fastest; `papilio package build .* --format fastest` makes"):
        open_format(package, "fastest")


def test_changed_bytes_of_a_format_are_refused_by_name(own) -> None:
    path = Path(format_path(own, "torch", "model.pt2"))
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    with pytest.raises(
        PackageError, match=r"model.pt2: is damaged: its checksum is not what format.json says; .* anew"
    ):
        open_format(own, "torch")
    path.write_bytes(raw[:-1])
    with pytest.raises(PackageError, match=r"has [\d,]+ bytes, not the [\d,]+ written"):
        open_format(own, "torch")
    path.unlink()
    with pytest.raises(PackageError, match=r"model.pt2: is missing; `papilio package build"):
        open_format(own, "torch")
    build_format(own, "torch")
    assert open_format(own, "torch").format_name == "torch"


def test_a_format_of_another_package_or_version_is_refused_by_name(own) -> None:
    path = Path(format_path(own, "torch", "format.json"))
    before = path.read_text()
    rewrite_format(own.folder, "torch", package_crc32=1)
    with pytest.raises(PackageError, match=r"was built from another package.json than that of"):
        open_format(own, "torch")
    path.write_text(json.dumps({**json.loads(before), "info_version": 1}))
    with pytest.raises(PackageError, match=r"format.json has version 1; this Papilio reads 2: `papilio package build"):
        open_format(own, "torch")
    path.write_text("{")
    with pytest.raises(PackageError, match=r"format.json is damaged; `papilio package build"):
        open_format(own, "torch")
    path.write_text(before)
    rewrite_format(own.folder, "torch", files=[])
    with pytest.raises(PackageError, match=r"format.json is damaged \(files: "):
        open_format(own, "torch")
    path.write_text(before)
    os.rename(format_path(own, "torch"), format_path(own, "onnx"))
    with pytest.raises(PackageError, match=r"formats/onnx is format torch under another name; `papilio package build"):
        open_format(own, "onnx")


def test_compiled_code_for_another_machine_is_refused_by_name(package, built) -> None:
    built("aoti")
    path = Path(format_path(package, "aoti", "format.json"))
    before = path.read_text()
    info = json.loads(before)
    try:
        rewrite_format(package.folder, "aoti", instruction_sets=[*info["instruction_sets"], "avx4096"])
        with pytest.raises(
            PackageError, match=r"compiled for a processor with avx4096, which this one lacks; `papilio"
        ):
            open_format(package, "aoti")
        rewrite_format(package.folder, "aoti", needs={**info["needs"], "torch": "1.0"})
        with pytest.raises(
            PackageError, match=r"was compiled for torch 1.0, here is 2\.\d+.*on this machine makes one"
        ):
            open_format(package, "aoti")
    finally:
        path.write_text(before)


def test_every_byte_of_a_format_can_be_verified(own, capsys) -> None:
    names = ["formats/torch/format.json", "formats/torch/model.pt2"]
    assert list(verify_formats(own)) == [(name, None) for name in names]
    assert sorted(os.listdir(Path(own.folder, "formats"))) == ["torch"]
    assert main(["package", "verify", own.folder]) == 0
    path = Path(own.folder, names[1])
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 3] ^= 1
    path.write_bytes(raw)
    assert [problem is None for _, problem in verify_formats(own)] == [True, False]
    capsys.readouterr()
    assert main(["package", "verify", own.folder]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"  {own.folder}/{names[1]} is damaged: its checksum is not what format.json says"
    assert lines[1].startswith(f"{own.folder}  DAMAGED: formats/torch, which nothing opens; build it again")
    assert "sound" not in "".join(lines)
    Path(own.folder, names[0]).write_text("{")
    ((file, problem),) = verify_formats(own)
    assert file == names[0] and problem == "is damaged; building it again fixes that"
