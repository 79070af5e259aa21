"""The packaged model against the papers' formulas on tables that NumPy reads from the package's bytes."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from papilio.data_pipeline.dataset import open_dataset
from papilio.trainer.inference.backends.flat_model import build_flat_model
from papilio.trainer.inference.export.export_options import ExportOptions
from papilio.trainer.inference.export.exporter import export_package
from papilio.trainer.inference.package.format import PRECISIONS, PackageError
from tests.support.datasets import ROWS_PER_TABLE, write_dataset
from tests.support.package_bytes import read_tables
from tests.support.trained_runs import CROSS, expected_probabilities, make_config, write_run

REPOSITORY = Path(__file__).resolve().parents[4]
NUM_DENSE = 3
MEANS = {"pooling": "mean", "table_pooling": {"b": "sum"}}
# t_a, t_b, t_m.
MIXED = (("t_a", "int4"), ("t_b", "fp16"), ("t_m", "int2"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data"))


def export(folder, data, *, quantize="int8", tables=(), **model):
    run, tensors = write_run(folder / "run", data, **model)
    options = ExportOptions(quantize=quantize, tables=tables, has_gate=False)
    return export_package(run, str(folder / "package"), options), tensors


def make_batch(num_samples, seed=0, *, longest=4):
    """Dense values, ids and lengths; bags of every length from 0 on, in every feature."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, longest + 1, (3, num_samples), generator=generator, dtype=torch.int32)
    ids = [
        torch.randint(0, rows, (int(of_feature.sum()),), generator=generator, dtype=torch.int32)
        for rows, of_feature in zip(ROWS_PER_TABLE.values(), lengths, strict=True)
    ]
    return torch.randn(num_samples, NUM_DENSE, generator=generator), torch.cat(ids), lengths.flatten()


def expected(package, tensors, data, batch, **model):
    tables = {name[2:]: values for name, values in read_tables(package.folder).items()}
    return expected_probabilities(make_config(data, **model), tables, tensors, *(part.numpy() for part in batch))


@pytest.mark.parametrize("precision", [*PRECISIONS, "mixed"])
@pytest.mark.parametrize("model", [{}, MEANS, CROSS, CROSS | MEANS], ids=["dlrm", "dlrm means", "dcnv2", "dcnv2 means"])
def test_probabilities_are_those_of_the_formulas(tmp_path, data, precision, model):
    quantize, tables = ("int8", MIXED) if precision == "mixed" else (precision, ())
    package, tensors = export(tmp_path, data, quantize=quantize, tables=tables, **model)
    flat = build_flat_model(package)
    for num_samples in (1, 7, 130):
        batch = make_batch(num_samples, seed=num_samples)
        found = flat(*batch)
        assert (found.dtype, found.shape) == (torch.float32, (num_samples,))
        np.testing.assert_allclose(found, expected(package, tensors, data, batch, **model), rtol=0, atol=1e-6)


def test_fp32_keeps_every_bit_of_tables_and_dense_part(tmp_path, data):
    package, tensors = export(tmp_path, data, quantize="fp32")
    for name, values in read_tables(package.folder).items():
        np.testing.assert_array_equal(values, tensors[f"tables.{name}.weight"])
    state = build_flat_model(package).dense_part.state_dict()
    assert {f"dense.model.{name}" for name in state} == {key for key in tensors if key.startswith("dense")}
    for name, values in state.items():
        np.testing.assert_array_equal(values, tensors[f"dense.model.{name}"])


@pytest.fixture(scope="module")
def small(tmp_path_factory, data):
    """A package of tables in all kinds of precision, and its checkpoint's tensors."""
    return export(tmp_path_factory.mktemp("small"), data, tables=MIXED, **MEANS)


def test_2048_samples_at_once_are_those_one_by_one(small):
    flat = build_flat_model(small[0])
    dense, ids, lengths = make_batch(2048, seed=3)
    together = flat(dense, ids, lengths)
    lengths_FB = lengths.view(3, -1)
    ends = lengths.cumsum(0).view(3, -1)
    for sample in (0, 1, 1000, 2047):
        parts = [ids[ends[f, sample] - lengths_FB[f, sample] : ends[f, sample]] for f in range(3)]
        alone = flat(dense[sample : sample + 1], torch.cat(parts), lengths_FB[:, sample].contiguous())
        torch.testing.assert_close(alone[0], together[sample], rtol=0, atol=1e-6)


def test_no_samples_give_no_probabilities(small):
    flat = build_flat_model(small[0])
    nothing = torch.empty(0, dtype=torch.int32)
    assert flat(torch.empty(0, NUM_DENSE), nothing, nothing).shape == (0,)
    assert flat.num_unknown_ids(nothing, nothing) == 0


def test_samples_of_empty_bags_only(small, data):
    package, tensors = small
    flat = build_flat_model(package)
    for num_samples in (1, 9):
        dense = make_batch(num_samples)[0]
        batch = dense, torch.empty(0, dtype=torch.int32), torch.zeros(3 * num_samples, dtype=torch.int32)
        np.testing.assert_allclose(flat(*batch), expected(package, tensors, data, batch, **MEANS), rtol=0, atol=1e-6)


@pytest.mark.parametrize("wrong", [-1, -(2**31), 2**31 - 1, 30])
def test_ids_out_of_range_are_the_unknown_row_and_counted(small, data, wrong):
    package, tensors = small
    flat = build_flat_model(package)
    dense, ids, lengths = make_batch(40, seed=5)
    ids[::7] = wrong  # 30 is out of every table's range
    num_wrong = len(ids[::7])
    before = dense.clone(), ids.clone(), lengths.clone()
    found = flat(dense, ids, lengths)
    assert flat.num_unknown_ids(ids, lengths) == num_wrong
    assert all(torch.equal(now, then) for now, then in zip((dense, ids, lengths), before, strict=True))
    np.testing.assert_allclose(found, expected(package, tensors, data, before, **MEANS), rtol=0, atol=1e-6)


def test_each_table_has_a_range_of_its_own(small):
    """16 is an id of a (30 rows) and of m (17), not of b (11)."""
    flat = build_flat_model(small[0])
    ids, lengths = torch.tensor([16, 16, 16], dtype=torch.int32), torch.ones(3, dtype=torch.int32)
    assert flat.num_unknown_ids(ids, lengths) == 1


def test_tables_in_memory_are_those_in_the_file(small):
    batch = make_batch(50)
    mapped, loaded = (build_flat_model(small[0], is_mapped=is_mapped) for is_mapped in (True, False))
    assert torch.equal(mapped(*batch), loaded(*batch))


def test_dense_weights_that_do_not_fit_are_refused(tmp_path, data):
    package, _ = export(tmp_path, data)
    config = Path(package.path("config.json"))
    changed = config.read_text().replace('"over_arch_layer_sizes": [\n   16', '"over_arch_layer_sizes": [\n   17')
    assert changed != config.read_text()
    config.write_text(changed)
    with pytest.raises(
        PackageError, match=r"config.json is damaged: its size or checksum is not what package.json says"
    ):
        build_flat_model(package)
    files = {**package.manifest.files, "config.json": _entry(config)}
    package = type(package)(package.folder, package.manifest.model_copy(update={"files": files}))
    with pytest.raises(PackageError, match=r"dense.safetensors does not fit config.json: Error\(s\) in loading"):
        build_flat_model(package)


def _entry(path):
    from papilio.trainer.inference.package.format import describe_files

    return describe_files(str(path.parent), [path.name])[path.name]


def test_a_fresh_process_needs_no_torchrec(small):
    """Nor does it write a page of the mapped tables, which processes on a machine share."""
    package, _ = small
    dense, ids, lengths = make_batch(7)
    here = build_flat_model(package)(dense, ids, lengths)
    code = f"""
import sys, torch
from papilio.trainer.inference.package.format import read_package
from papilio.trainer.inference.backends.flat_model import build_flat_model
flat = build_flat_model(read_package({package.folder!r}))
found = flat(torch.tensor({dense.tolist()}), torch.tensor({ids.tolist()}).int(), torch.tensor({lengths.tolist()}).int())
print(found.tolist())
assert "torchrec" not in sys.modules
mapping = open("/proc/self/smaps").read().split({package.path("tables.bin")!r})[1].split("VmFlags")[0]
assert "Private_Dirty:         0 kB" in mapping, mapping
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False, cwd=REPOSITORY
    )
    assert result.returncode == 0, result.stderr
    np.testing.assert_allclose(eval(result.stdout), here.numpy(), rtol=0, atol=1e-7)


def test_rows_of_a_data_set_are_read_as_the_model_takes_them(small, data):
    from papilio.trainer.inference.export.held_out import HeldOut

    package, tensors = small
    dataset = open_dataset(data)
    (block,) = HeldOut.for_gate(dataset).blocks()
    batch = block.dense, block.ids, block.lengths
    found = build_flat_model(package)(*batch)
    np.testing.assert_allclose(found, expected(package, tensors, data, batch, **MEANS), rtol=0, atol=1e-6)
