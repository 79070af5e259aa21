"""Plain tensors out of a checkpoint: those of the live model, in files that the safetensors library reads."""

import itertools
import json
import os
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from papilio.trainer.checkpoint import whole_tensors
from papilio.trainer.checkpoint.folder import CheckpointFolder
from papilio.trainer.checkpoint.format import INDEX, Block, CheckpointError, DamagedError, SavedTensor
from papilio.trainer.checkpoint.tensor_export import DENSE_FILE, DENSE_OPTIMIZER_FILE, MANIFEST, plan_export
from papilio.trainer.checkpoint.whole_tensors import stream_tensor
from papilio.trainer.storage.api import StorageError
from tests.support.checkpoints import NAME, load_model, newest, save_model, write_checkpoint
from tests.support.clicks import DIM, EVERY_TYPE, TABLES, optimizer_config, shard_clicks, train_steps

SMALL_BLOCK_BYTES = 96  # three rows of eight float32


def train_and_save(ranks, folder, optimizer):
    from papilio.trainer.checkpoint import pieces

    block_bytes, pieces.BLOCK_BYTES = pieces.BLOCK_BYTES, SMALL_BLOCK_BYTES
    try:
        model, optimizers = shard_clicks(ranks, EVERY_TYPE, optimizer_config(optimizer))
        train_steps(ranks, model, optimizers, range(2))
        save_model(ranks, model, optimizers, folder, step=2)
    finally:
        pieces.BLOCK_BYTES = block_bytes


def live_tensors(ranks, folder, optimizer):
    """Load a checkpoint into a model on one rank, each table whole; return its weights and states by file and name."""
    from papilio.sharding.runtime.table_shards import local_table_shards

    model, optimizers = shard_clicks(ranks, dict.fromkeys(EVERY_TYPE, "table_wise"), optimizer_config(optimizer))
    load_model(ranks, model, optimizers, folder)
    tensors = {}
    for shard in local_table_shards(model.module):
        states = {name: values for name, values in shard.states.items() if values.dim() == 2}
        tensors[f"{shard.table}.safetensors"] = {"weight": shard.weight, **states}
    tensors[DENSE_FILE] = {name: values for name, values in model.module.state_dict().items() if ".linear." in name}
    return {file: {key: value.detach().clone() for key, value in of.items()} for file, of in tensors.items()}


def export(folder, output, **options):
    folder = CheckpointFolder(str(folder))
    plan_export(folder, folder.committed_names()[-1], **options).write(str(output))
    return {path.name: load_file(path) for path in sorted(Path(output).glob("*.safetensors"))}


def check_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name].dtype == values.dtype
        assert torch.equal(found[name], values), name


def test_every_sharding_type_is_exported_whole(four_ranks, one_rank, tmp_path, monkeypatch):
    """Many blocks a shard, some of rows, some of columns, some of both."""
    four_ranks.run(train_and_save, tmp_path / "saved", "adagrad")
    expected = one_rank.run(live_tensors, tmp_path / "saved", "adagrad")[0]
    monkeypatch.setattr(whole_tensors, "CHUNK_BYTES", 2 * DIM * 4)
    found = export(tmp_path / "saved", tmp_path / "out", with_optimizer=True)
    found.pop(DENSE_OPTIMIZER_FILE, None)  # sgd remembers nothing
    assert len(found) == len(TABLES) + 1
    for file, tensors in expected.items():
        check_equal(found[file], tensors)
        assert file == DENSE_FILE or len(tensors) > 1


def test_row_wise_states_keep_their_blocks_of_columns(four_ranks, tmp_path):
    four_ranks.run(train_and_save, tmp_path / "saved", "rowwise_adagrad")
    found = export(tmp_path / "saved", tmp_path / "out", with_optimizer=True)
    folder = newest(tmp_path / "saved")
    index = json.loads((folder / INDEX).read_text())["tensors"]
    for name, (rows, _) in TABLES.items():
        num_blocks = 2 if name.partition("_")[2] in ("column_wise", "table_column_wise", "grid_shard") else 1
        (key,) = [key for key in found[f"t_{name}.safetensors"] if key.startswith("row_wise.")]
        assert found[f"t_{name}.safetensors"][key].shape == (rows, num_blocks)
        with safe_open(tmp_path / "out" / f"t_{name}.safetensors", "pt") as file:
            starts = json.loads(file.metadata()[f"{key}.column_starts"])
        assert starts == index[f"tables.t_{name}.{key}"]["column_starts"] == [0, DIM // 2][:num_blocks]


def test_weights_of_chosen_tables_and_a_manifest_that_describes_them(four_ranks, tmp_path):
    four_ranks.run(train_and_save, tmp_path / "saved", "adagrad")
    found = export(tmp_path / "saved", tmp_path / "out", table_patterns=["t_sum_row*", "t_mean_grid_shard"])
    chosen = ["t_mean_grid_shard.safetensors", "t_sum_row_wise.safetensors"]
    assert sorted(found) == [DENSE_FILE, *chosen]
    assert all(list(found[file]) == ["weight"] for file in chosen)
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert (manifest["step"], manifest["checkpoint"]) == (2, NAME.format(2))
    assert sorted(manifest["files"]) == sorted(found)
    for file, entry in manifest["files"].items():
        raw = (tmp_path / "out" / file).read_bytes()
        assert (entry["num_bytes"], entry["crc32"]) == (len(raw), zlib.crc32(raw))
        assert {name: tuple(of["shape"]) for name, of in entry["tensors"].items()} == {
            name: tuple(values.shape) for name, values in found[file].items()
        }


def cut(values, generator):
    """Cut an array at random into blocks of columns, and each of these into blocks of rows of its own."""
    rows = values.shape[0]
    columns = sorted({0, values.shape[1], *generator.integers(0, values.shape[1] + 1, 2).tolist()})
    for left, right in itertools.pairwise(columns):
        marks = sorted({0, rows, *generator.integers(0, rows + 1, 3).tolist()})
        for top, bottom in itertools.pairwise(marks):
            yield (top, left), values[top:bottom, left:right]


def write_blocks(folder, blocks, dtype, shape):
    """Write blocks (offsets, values) to a file in the order given."""
    raw, placed = b"", []
    for offsets, values in blocks:
        part = np.ascontiguousarray(values).tobytes()
        placed.append(Block(tuple(offsets), values.shape, "p.bin", len(raw), len(part), zlib.crc32(part)))
        raw += part
    Path(folder, "p.bin").write_bytes(raw)
    return SavedTensor(dtype, shape, tuple(placed))


@pytest.mark.parametrize("seed", range(20))
def test_blocks_of_any_cut_make_up_the_tensor(tmp_path, monkeypatch, seed):
    generator = np.random.default_rng(seed)
    dtype = ["float32", "float64", "int64", "float16"][seed % 4]
    values = (100 * generator.normal(size=(int(generator.integers(1, 40)), int(generator.integers(1, 9))))).astype(
        dtype
    )
    blocks = list(cut(values, generator))
    generator.shuffle(blocks)
    tensor = write_blocks(tmp_path, blocks, dtype, values.shape)
    monkeypatch.setattr(whole_tensors, "CHUNK_BYTES", 64)
    assert b"".join(stream_tensor(str(tmp_path), "k", tensor)) == values.tobytes()


@pytest.mark.parametrize("shape", [(), (5,), (4, 3, 2), (0, 8), (3, 0)])
def test_tensors_that_are_no_tables(tmp_path, shape):
    values = np.arange(np.prod(shape, dtype=int), dtype="float32").reshape(shape)
    blocks = [((0,) * values.ndim, values)]
    if values.ndim and values.size:
        blocks = [((0,) + (0,) * (values.ndim - 1), values[:2]), ((2,) + (0,) * (values.ndim - 1), values[2:])]
    tensor = write_blocks(tmp_path, blocks, "float32", shape)
    assert b"".join(stream_tensor(str(tmp_path), "k", tensor)) == values.tobytes()


@pytest.mark.parametrize("wrong", ["hole", "overlap", "beyond", "none"])
def test_blocks_that_do_not_make_up_the_tensor_are_refused(tmp_path, wrong):
    values = np.zeros((6, 4), "float32")
    blocks = [((0, 0), values[:3, :2]), ((3, 0), values[3:, :2]), ((0, 2), values[:, 2:])]
    changed = {"hole": blocks[:2], "overlap": [*blocks, blocks[0]], "none": [], "beyond": [*blocks, ((6, 0), values)]}
    tensor = write_blocks(tmp_path, changed[wrong], "float32", (6, 4))
    with pytest.raises(DamagedError, match=r"the blocks of k do not make up rows \d to \d+ of \[6, 4\]"):
        list(stream_tensor(str(tmp_path), "k", tensor))


def test_a_table_larger_than_memory_is_streamed(tmp_path, monkeypatch):
    """48 MiB in blocks of 1 MiB, cut into two blocks of columns: two blocks and a chunk at a time."""
    mib = 1 << 20
    values = np.arange(12 * mib, dtype="float32").reshape(-1, 16)
    blocks = [
        ((row, column), values[row : row + rows, column : column + width])
        for column, width in ((0, 4), (4, 12))
        for rows in [mib // (4 * width)]
        for row in range(0, len(values), rows)
    ]
    tensor = write_blocks(tmp_path, blocks, "float32", values.shape)
    monkeypatch.setattr(whole_tensors, "CHUNK_BYTES", mib)
    crc32 = num_bytes = 0
    tracemalloc.start()
    for chunk in stream_tensor(str(tmp_path), "k", tensor):
        crc32 = zlib.crc32(chunk, crc32)
        num_bytes += chunk.nbytes
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (num_bytes, crc32) == (values.nbytes, zlib.crc32(values))
    assert peak < 6 * mib


TABLE = {"tables.t_a.weight": np.arange(12, dtype="float32").reshape(3, 4)}


def test_wide_items_come_first_so_that_all_are_aligned(tmp_path):
    tensors = {"tables.t_a.weight": np.ones((1, 3), "float16"), "tables.t_a.sum": np.full((1, 3), 2.0)}
    write_checkpoint(tmp_path / "saved", tensors)
    (found,) = export(tmp_path / "saved", tmp_path / "out", with_optimizer=True).values()
    assert found["weight"].tolist() == [[1, 1, 1]] and found["weight"].dtype == torch.float16
    assert found["sum"].tolist() == [[2, 2, 2]] and found["sum"].dtype == torch.float64
    raw = (tmp_path / "out" / "t_a.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    assert length % 8 == 0
    assert json.loads(raw[8 : 8 + length])["sum"]["data_offsets"] == [0, 24]


def test_features_of_any_name_are_files_in_one_folder(tmp_path):
    tensors = {f"tables.{table}.weight": TABLE["tables.t_a.weight"] for table in ("t_a/b", "t_../c", "t_d.row_wise.e")}
    write_checkpoint(tmp_path / "saved", tensors)
    export(tmp_path / "saved", tmp_path / "out")
    names = ["manifest.json", "t_..%2Fc.safetensors", "t_a%2Fb.safetensors", "t_d.row_wise.e.safetensors"]
    assert sorted(os.listdir(tmp_path / "out")) == names


def test_copies_with_tables_of_their_own_get_folders_of_their_own(tmp_path):
    copies = [{"tables.t_a.weight": np.full((2, 4), copy, "float32")} for copy in range(2)]
    write_checkpoint(tmp_path / "saved", copies, num_copies=2)
    export(tmp_path / "saved", tmp_path / "out")
    for copy in range(2):
        found = load_file(tmp_path / "out" / f"group_{copy}" / "t_a.safetensors")["weight"]
        assert found.tolist() == [[copy] * 4] * 2
    assert sorted(json.loads((tmp_path / "out" / MANIFEST).read_text())["files"]) == [
        f"group_{copy}/t_a.safetensors" for copy in range(2)
    ]


def test_a_damaged_block_leaves_nothing_behind(tmp_path):
    path = write_checkpoint(tmp_path / "saved", {**TABLE, "tables.t_b.weight": np.ones((2, 4), "float32")})
    raw = bytearray((path / "r.bin").read_bytes())
    raw[-5] ^= 1
    (path / "r.bin").write_bytes(raw)
    with pytest.raises(DamagedError, match=r"r\.bin is damaged: bytes 48 to 80 \(tables\.t_b\.weight\)"):
        export(tmp_path / "saved", tmp_path / "out")
    assert os.listdir(tmp_path) == ["saved"]


def test_a_folder_in_use_is_refused_and_an_empty_one_is_filled(tmp_path):
    write_checkpoint(tmp_path / "saved", TABLE)
    (tmp_path / "out").mkdir()
    export(tmp_path / "saved", tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"out exists and is not empty; choose another --output, or remove it"):
        export(tmp_path / "saved", tmp_path / "out")
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="file"):
        export(tmp_path / "saved", tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b""


def test_a_disk_too_small_is_found_before(tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "saved", TABLE)
    monkeypatch.setattr("papilio.trainer.checkpoint.tensor_export.free_bytes", lambda folder: 1000)
    with pytest.raises(CheckpointError, match=r"needs \d+ bytes, .*out has 1,000 free; choose an --output on another"):
        export(tmp_path / "saved", tmp_path / "out")
    assert os.listdir(tmp_path) == ["saved"]


def test_an_unknown_table_names_the_nearest(tmp_path):
    write_checkpoint(tmp_path / "saved", {f"tables.t_C{i}.weight": np.ones((1, 4), "float32") for i in range(1, 10)})
    with pytest.raises(CheckpointError, match="--tables C1: no table has such a name; there are t_C1"):
        export(tmp_path / "saved", tmp_path / "out", table_patterns=["t_C2", "C1"])
    with pytest.raises(CheckpointError, match=r"--tables x\*: .* there are t_C1, t_C2, t_C3, t_C4, t_C5, \.\.\."):
        export(tmp_path / "saved", tmp_path / "out", table_patterns=["x*"])


def test_from_one_object_store_to_another_place_in_it(s3, tmp_path):
    write_checkpoint(tmp_path / "saved", TABLE)
    folder = CheckpointFolder(str(tmp_path / "saved"))
    plan_export(folder, folder.names()[0]).write(f"s3://{s3.bucket}/out")
    from papilio.trainer.storage.api import list_folder, read_bytes

    assert list_folder(f"s3://{s3.bucket}/out") == ["manifest.json", "t_a.safetensors"]
    (tmp_path / "copy.safetensors").write_bytes(read_bytes(f"s3://{s3.bucket}/out/t_a.safetensors"))
    assert load_file(tmp_path / "copy.safetensors")["weight"].tolist() == TABLE["tables.t_a.weight"].tolist()
    with pytest.raises(CheckpointError, match="is not empty"):
        plan_export(folder, folder.names()[0]).write(f"s3://{s3.bucket}/out")
