"""A run that was killed continues; another command in its folder is refused; a finished data set is kept."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from papilio.data_pipeline.manifest import MANIFEST_NAME, Manifest
from papilio.data_pipeline.preprocess import byte_blocks
from papilio.data_pipeline.preprocess.bad_rows import PreprocessError
from papilio.data_pipeline.preprocess.engine import preprocess
from papilio.data_pipeline.preprocess.preprocess_options import PreprocessOptions
from papilio.data_pipeline.preprocess.stage_folder import STAGE_NAME, STAGE_VERSION
from tests.support.criteo_text import all_bytes, criteo_lines, criteo_options

KILLED_SCRIPT = """
import os, signal, sys
from papilio.data_pipeline.preprocess import byte_blocks
from papilio.data_pipeline.preprocess import parse_stage
from papilio.data_pipeline.preprocess import vocabulary_stage
from papilio.data_pipeline.preprocess import shard_stage
from papilio.data_pipeline.preprocess import engine as p
from papilio.data_pipeline.preprocess.preprocess_options import PreprocessOptions
byte_blocks.read_blocks.__defaults__ = (30_000,)
def waits_to_be_killed(function):
    def run(task):
        while os.path.exists(sys.argv[2]):
            signal.pause()
        return function(task)
    return run
options = PreprocessOptions.model_validate_json(sys.argv[1])
if options.num_workers == 1:
    parse_stage.parse_block = waits_to_be_killed(parse_stage.parse_block)
    p.build_column = waits_to_be_killed(p.build_column)
    p.write_split_shard = waits_to_be_killed(p.write_split_shard)
p.preprocess(options)
"""


@pytest.mark.parametrize("killed_at", ["chunk_0000005", "column_0007", "shard_0_0000000", "several"])
def test_a_killed_run_continues_to_the_same_bytes(tmp_path, monkeypatch, killed_at):
    monkeypatch.setattr(byte_blocks.read_blocks, "__defaults__", (30_000,))
    (tmp_path / "train.txt").write_bytes(b"\n".join(criteo_lines(2_000)) + b"\n")
    options = criteo_options(tmp_path / "train.txt", tmp_path / "out")
    stage = tmp_path / "out" / STAGE_NAME
    for name in ["chunk_0000003", "column_0002", "column_0019"] if killed_at == "several" else [killed_at]:
        kill_when_there(options, stage / name)
        assert not (tmp_path / "out" / MANIFEST_NAME).exists()
    parts = {name: (stage / name).stat().st_mtime_ns for name in os.listdir(stage) if name.startswith("chunk")}
    assert parts
    opened = []
    monkeypatch.setattr("papilio.data_pipeline.preprocess.parse_stage.parse_rows", count_calls(opened))
    preprocess(options)
    preprocess(criteo_options(tmp_path / "train.txt", tmp_path / "whole"))
    assert not stage.exists()
    assert all_bytes(tmp_path / "out") == all_bytes(tmp_path / "whole")
    num_chunks = max(block.index for block in opened) + 1
    assert len(opened) == 2 * num_chunks - len([name for name in parts if not name.endswith(".tmp")])


def test_a_killed_run_of_two_workers_continues_to_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(byte_blocks.read_blocks, "__defaults__", (30_000,))
    (tmp_path / "train.txt").write_bytes(b"\n".join(criteo_lines(2_000)) + b"\n")
    options = criteo_options(tmp_path / "train.txt", tmp_path / "out", num_workers=2)
    kill_when_there(options, tmp_path / "out" / STAGE_NAME / "chunk_0000000")
    preprocess(options)
    preprocess(criteo_options(tmp_path / "train.txt", tmp_path / "whole"))
    assert all_bytes(tmp_path / "out") == all_bytes(tmp_path / "whole")


def count_calls(opened: list):
    from papilio.data_pipeline.preprocess.parse_stage import parse_rows

    def counted(block, *words):
        opened.append(block)
        return parse_rows(block, *words)

    return counted


def kill_when_there(options: PreprocessOptions, path: Path) -> None:
    script = [sys.executable, "-c", KILLED_SCRIPT, options.model_dump_json(), str(path)]
    environment = os.environ | {"PYTHONPATH": str(Path(byte_blocks.__file__).parents[3])}
    process = subprocess.Popen(script, env=environment)
    deadline = time.monotonic() + 60
    while not path.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def test_workers_end_when_their_parent_is_killed(tmp_path):
    script = (
        "import os, sys, time\n"
        "from papilio.data_pipeline.preprocess.work_pool import WorkPool\n"
        "if __name__ == '__main__':\n"
        "    with WorkPool(2) as pool:\n"
        "        for pid in pool.map_ordered(pow, []): pass\n"
        "        future = pool._executor.submit(os.getpid)\n"
        "        print(future.result(), flush=True)\n"
        "        pool._executor.submit(time.sleep, 60)\n"
        "        time.sleep(60)\n"
    )
    (tmp_path / "parent.py").write_text(script)
    environment = os.environ | {"PYTHONPATH": str(Path(byte_blocks.__file__).parents[3])}
    process = subprocess.Popen([sys.executable, tmp_path / "parent.py"], env=environment, stdout=subprocess.PIPE)
    worker = int(process.stdout.readline())
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while Path(f"/proc/{worker}").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not Path(f"/proc/{worker}/cmdline").exists() or not Path(f"/proc/{worker}/cmdline").read_bytes()


def test_other_options_are_refused_with_the_differences(tmp_path):
    (tmp_path / "train.txt").write_bytes(b"\n".join([*criteo_lines(20), b"bad"]) + b"\n")
    with pytest.raises(PreprocessError):
        preprocess(criteo_options(tmp_path / "train.txt", tmp_path / "out"))
    with pytest.raises(PreprocessError, match=r"unfinished work of another command .*num_buckets: was None, now 100"):
        preprocess(criteo_options(tmp_path / "train.txt", tmp_path / "out", num_buckets=100, max_bad_rows=1))
    manifest = preprocess(criteo_options(tmp_path / "train.txt", tmp_path / "out", max_bad_rows=1))
    assert (manifest.num_rows, manifest.num_bad_rows) == (20, 1)


def test_columns_that_changed_are_named_one_by_one(tmp_path):
    (tmp_path / "in.csv").write_text("y,when,a,b\n1,today,2,3\n")
    schema = tmp_path / "schema.toml"
    options = {"source": "table", "inputs": (f"{tmp_path}/in.csv",), "output": f"{tmp_path}/out"}
    options = PreprocessOptions(**options, schema_path=str(schema))
    columns = ['label = "y"', '[[dense]]\nname = "a"', '[[categorical]]\nname = "b"']
    schema.write_text("\n".join([*columns, '[[dense]]\nname = "when"']))
    with pytest.raises(PreprocessError, match="field when: 'today' is not a number"):
        preprocess(options)
    schema.write_text("\n".join(columns).replace('"a"', '"a"\ntransform = "identity"'))
    differences = r"\(schema\.dense\.a\.transform: was 'log1p', now 'identity'; schema\.dense\.when: left out now\)"
    with pytest.raises(PreprocessError, match=differences):
        preprocess(options)


def test_a_finished_data_set_is_returned_or_kept(tmp_path):
    (tmp_path / "train.txt").write_bytes(b"\n".join(criteo_lines(20)) + b"\n")
    first: Manifest = preprocess(criteo_options(tmp_path / "train.txt", tmp_path / "out"))
    before = all_bytes(tmp_path / "out")
    assert preprocess(criteo_options(tmp_path / "train.txt", tmp_path / "out")) == first
    with pytest.raises(PreprocessError, match="holds a data set made with other options or inputs"):
        preprocess(criteo_options(tmp_path / "train.txt", tmp_path / "out", frequency_threshold=2))
    assert all_bytes(tmp_path / "out") == before
    flip(tmp_path / "out" / MANIFEST_NAME, 100)
    with pytest.raises(PreprocessError, match=r"is damaged .*; preprocess the data again \(first delete .*out, or"):
        preprocess(criteo_options(tmp_path / "train.txt", tmp_path / "out"))


class StoppedError(Exception):
    """Stands for a kill."""


def stop_before(monkeypatch, function: str, options: PreprocessOptions) -> Path:
    """Begin the work and stop it before a function of `preprocess` is called; return the stage's folder."""

    def stop(*_):
        raise StoppedError

    with monkeypatch.context() as patched:
        patched.setattr(f"papilio.data_pipeline.preprocess.engine.{function}", stop)
        with pytest.raises(StoppedError):
            preprocess(options)
    return Path(options.output) / STAGE_NAME


def write_input(path: Path, seed: int) -> None:
    """Two thousand rows and more than one block of text, of a size that does not depend on the seed."""
    if path.suffix == ".parquet":
        ids = [(seed * 100 + row) % 7 for row in range(2_000)]
        table = pa.table({"label": [row % 2 for row in range(2_000)], "age": ids, "user": ids})
        pq.write_table(table, path, compression="none", use_dictionary=False, write_statistics=False)
        return
    lines = [b"%d\t%s\t%s" % (seed % 2, b"\t".join([b"3"] * 13), b"\t".join([b"a%d" % (seed % 7)] * 26))] * 2_000
    text = b"\n".join(lines) + b"\n"
    path.write_bytes(gzip.compress(text, compresslevel=0, mtime=0) if path.suffix == ".gz" else text)


def options_of(path: Path, output: Path) -> PreprocessOptions:
    if path.suffix != ".parquet":
        return criteo_options(path, output)
    schema = path.parent / "schema.toml"
    schema.write_text('dense = [{name = "age"}]\ncategorical = [{name = "user"}]')
    table = {"source": "table", "schema_path": str(schema), "split": "fraction"}
    return PreprocessOptions(inputs=(str(path),), output=str(output), num_workers=1, show_progress=False, **table)


@pytest.mark.parametrize("name", ["train.txt", "train.txt.gz", "train.parquet"])
def test_an_input_of_other_content_and_the_same_size_is_noticed(tmp_path, monkeypatch, name):
    monkeypatch.setattr(byte_blocks.read_blocks, "__defaults__", (100_000,))
    path = tmp_path / name
    write_input(path, seed=1)
    options, size = options_of(path, tmp_path / "out"), path.stat().st_size
    stage = stop_before(monkeypatch, "_build_columns", options)
    write_input(path, seed=2)
    os.utime(path, (0, 0))
    assert path.stat().st_size == size
    with pytest.raises(PreprocessError, match=r"is not the one .* begun with: .*near byte 0\. Put"):
        preprocess(options)
    write_input(path, seed=1)
    preprocess(options)
    assert not stage.exists()
    preprocess(options_of(path, tmp_path / "whole"))
    assert all_bytes(tmp_path / "out") == all_bytes(tmp_path / "whole")
    write_input(path, seed=2)
    with pytest.raises(PreprocessError, match=r"out holds a data set made of other content of the same"):
        preprocess(options)


def test_an_input_that_changes_while_it_is_read_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "train.txt"
    write_input(path, seed=1)
    monkeypatch.setattr("papilio.data_pipeline.preprocess.engine.parse_inputs", lambda *_: write_input(path, seed=2))
    with pytest.raises(PreprocessError, match=r"train\.txt was changed while it was read; delete .*in_progress"):
        preprocess(options_of(path, tmp_path / "out"))


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("place", "stopped_before"), [(8_000, "_write_shards"), (-5, "_build_columns"), (-60, "_build_columns")]
)
def test_a_damaged_chunk_is_named_and_made_anew(tmp_path, monkeypatch, place, stopped_before):
    path = tmp_path / "train.txt"
    path.write_bytes(b"\n".join(criteo_lines(500)) + b"\n")
    options = criteo_options(path, tmp_path / "out")
    chunk = stop_before(monkeypatch, stopped_before, options) / "chunk_0000000"
    flip(chunk, place)
    with pytest.raises(PreprocessError, match=r"damaged: .*chunk_0000000 is not .*; delete it and give"):
        preprocess(options)
    chunk.unlink()
    preprocess(options)
    preprocess(criteo_options(path, tmp_path / "whole"))
    assert all_bytes(tmp_path / "out") == all_bytes(tmp_path / "whole")


def test_damaged_results_of_later_stages_are_made_anew_or_named(tmp_path, monkeypatch):
    path = tmp_path / "train.txt"
    path.write_bytes(b"\n".join(criteo_lines(300)) + b"\n")
    options = criteo_options(path, tmp_path / "out")
    stage = stop_before(monkeypatch, "_write_shards", options)
    flip(stage / "ids_0003", 4)
    with pytest.raises(PreprocessError, match=r"ids_0003 is not .*; delete .*column_0003 and give"):
        preprocess(options)
    (stage / "column_0003").unlink()
    stop_before(monkeypatch, "write_manifest", options)
    flip(tmp_path / "out" / "train" / "00000.arrow", 300)
    (tmp_path / "out" / "test" / "00000.arrow").unlink()
    flip(tmp_path / "out" / "vocabulary" / "C2.npy", -1)
    preprocess(options)
    preprocess(criteo_options(path, tmp_path / "whole"))
    assert all_bytes(tmp_path / "out") == all_bytes(tmp_path / "whole")


def test_a_request_that_is_damaged_or_of_another_version_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "train.txt"
    path.write_bytes(b"\n".join(criteo_lines(20)) + b"\n")
    options = criteo_options(path, tmp_path / "out")
    request = stop_before(monkeypatch, "_build_columns", options) / "request.json"
    started = json.loads(request.read_text())
    del started["stage_version"]
    request.write_text(json.dumps(started))
    with pytest.raises(PreprocessError, match=rf"\(stage_version: was None, now {STAGE_VERSION}\)"):
        preprocess(options)
    for data in (b"", b"[]", b"\xff", b"[" * 100_000):
        request.write_bytes(data)
        with pytest.raises(PreprocessError, match=r"damaged: .*request\.json .*; delete .*in_progress to"):
            preprocess(options)
