"""A run that was killed continues; another command in its folder is refused; a finished data set is kept."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_pipeline import byte_blocks
from data_pipeline.bad_rows import PreprocessError
from data_pipeline.manifest import MANIFEST_NAME, Manifest
from data_pipeline.preprocess import preprocess
from data_pipeline.preprocess_options import PreprocessOptions
from data_pipeline.stage import STAGE_NAME
from tests.support.criteo_text import all_bytes, criteo_lines, criteo_options

KILLED_SCRIPT = """
import sys, time
from data_pipeline import byte_blocks, parse_stage, vocabulary_stage, shard_stage, preprocess as p
from data_pipeline.preprocess_options import PreprocessOptions
byte_blocks.read_blocks.__defaults__ = (30_000,)
def slowly(function):
    def run(task):
        result = function(task)
        time.sleep(0.02)
        return result
    return run
options = PreprocessOptions.model_validate_json(sys.argv[1])
if options.num_workers == 1:
    parse_stage.parse_block = slowly(parse_stage.parse_block)
    p.build_column = slowly(p.build_column)
    p.write_split_shard = slowly(p.write_split_shard)
p.preprocess(options)
"""


@pytest.mark.parametrize("killed_at", ["chunk_0000005", "column_0007", "shard_0_0000000.json", "several"])
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
    monkeypatch.setattr("data_pipeline.parse_stage.parse_rows", count_calls(opened))
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
    from data_pipeline.parse_stage import parse_rows

    def counted(block, *words):
        opened.append(block)
        return parse_rows(block, *words)

    return counted


def kill_when_there(options: PreprocessOptions, path: Path) -> None:
    script = [sys.executable, "-c", KILLED_SCRIPT, options.model_dump_json()]
    environment = os.environ | {"PYTHONPATH": str(Path(byte_blocks.__file__).parents[1])}
    process = subprocess.Popen(script, env=environment)
    deadline = time.monotonic() + 60
    while not path.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def test_workers_end_when_their_parent_is_killed(tmp_path):
    script = (
        "import os, sys, time\n"
        "from data_pipeline.work_pool import WorkPool\n"
        "if __name__ == '__main__':\n"
        "    with WorkPool(2) as pool:\n"
        "        for pid in pool.map_ordered(pow, []): pass\n"
        "        future = pool._executor.submit(os.getpid)\n"
        "        print(future.result(), flush=True)\n"
        "        pool._executor.submit(time.sleep, 60)\n"
        "        time.sleep(60)\n"
    )
    (tmp_path / "parent.py").write_text(script)
    environment = os.environ | {"PYTHONPATH": str(Path(byte_blocks.__file__).parents[1])}
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


def test_a_finished_data_set_is_returned_or_kept(tmp_path):
    (tmp_path / "train.txt").write_bytes(b"\n".join(criteo_lines(20)) + b"\n")
    first: Manifest = preprocess(criteo_options(tmp_path / "train.txt", tmp_path / "out"))
    before = all_bytes(tmp_path / "out")
    assert preprocess(criteo_options(tmp_path / "train.txt", tmp_path / "out")) == first
    with pytest.raises(PreprocessError, match="holds a data set made with other options or inputs"):
        preprocess(criteo_options(tmp_path / "train.txt", tmp_path / "out", frequency_threshold=2))
    assert all_bytes(tmp_path / "out") == before
