"""The run folder: of a job that was started again, and on disks that fail."""

import json
import logging
import os

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from papilio.trainer.config import OutputConfig
from papilio.trainer.config_file import build_config
from papilio.trainer.run.folder import RunFolder, choose_run_dir
from papilio.trainer.storage.api import to_json
from tests.support.datasets import write_dataset


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data"))


def open_folder(data, path, step=0, validated=(), *, tensorboard=False):
    from papilio.data_pipeline.dataset import open_dataset

    tree = {"name": "small", "data": {"path": data}, "output": {"tensorboard": tensorboard}}
    return RunFolder(str(path), build_config(tree, source="test"), open_dataset(data), {}, step, validated)


def line_of(kind, step):
    return json.dumps({"kind": kind, "step": step}).encode() + b"\n"


@pytest.mark.parametrize("is_validated", [True, False])
def test_a_run_that_goes_on_drops_what_it_will_measure_again(data, tmp_path, caplog, is_validated):
    """Steps after the checkpoint, a line that a kill cut off, and what of its own step is measured after it."""
    path = tmp_path / "run" / "metrics.jsonl"
    path.parent.mkdir()
    lines = [line_of(*entry) for entry in (("train", 10), ("validation", 12), ("test", 12), ("train", 20))]
    path.write_bytes(b"".join(lines) + b'{"kind": "validation", "st')
    open_folder(data, path.parent, 12, [5, 12] if is_validated else [5]).close()
    assert path.read_bytes() == lines[0] + (lines[1] if is_validated else b"")
    assert caplog.text == "", "nothing of it is news"


@pytest.mark.parametrize(
    "damaged",
    [
        b'{"kind": "tra\n',
        b"\x00\x00\xff\xfe\n",
        b"[1, 2]\n",
        b"3\n",
        b'{"kind": "train"}\n',
        b"\n",
        b"[" * 100_000 + b"\n",
    ],
)
def test_a_damaged_line_is_told_and_left_out(data, tmp_path, caplog, damaged):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(line_of("train", 1) + damaged + line_of("train", 2))
    open_folder(data, tmp_path, 12).close()
    assert path.read_bytes() == line_of("train", 1) + line_of("train", 2)
    assert path.with_name("metrics.jsonl.damaged").read_bytes() == damaged, "nothing is lost"
    assert [record.message for record in caplog.records] == [
        f"{path}: 1 damaged line(s) (2) are left out, and kept in {path}.damaged"
    ]


def test_a_full_disk_is_told_once_and_ends_nothing(data, tmp_path, caplog):
    """/dev/full gives what a full disk does; what comes before and after that is whole."""
    folder = open_folder(data, tmp_path, tensorboard=True)
    folder.append("train", 1, {"logloss": 0.5})
    (events,) = (tmp_path / "tensorboard").iterdir()
    descriptors = {str(file.path): file._file for file in (folder._metrics, folder._events._file)}
    kept = {path: os.dup(descriptors[str(path)]) for path in (tmp_path / "metrics.jsonl", events)}
    full = os.open("/dev/full", os.O_WRONLY)
    for path in kept:
        os.dup2(full, descriptors[str(path)])
    folder.append("train", 2, {"logloss": 0.4})
    folder.append("train", 3, {"logloss": 0.4})
    for path, descriptor in kept.items():
        os.dup2(descriptor, descriptors[str(path)])
        os.close(descriptor)
    os.close(full)
    folder.append("train", 4, {"logloss": 0.3})
    folder.close()
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 4]
    assert [event.step for event in events_of(events, "train/logloss")] == [1, 4]
    for path in kept:
        mine = [record.message for record in caplog.records if str(path) in record.message]
        assert mine == [
            f"{path} cannot be written: No space left on device; training goes on without",
            f"{path} lacks 2 record(s) that could not be written",
        ]


def test_half_a_line_is_taken_back(tmp_path):
    """A disk that takes half a line before it is full: a limit on the file's size cuts the write."""
    import resource
    import signal

    from papilio.trainer.run.appended_file import AppendedFile

    file = AppendedFile(str(tmp_path / "m"))
    file.append(b"whole\n")
    limit, ignored = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (9, limit[1]))
        file.append(b"cut off\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, ignored)
    file.append(b"next\n")
    assert (tmp_path / "m").read_bytes() == b"whole\nnext\n"


@pytest.mark.parametrize("name", ["metrics.jsonl", "tensorboard"])
def test_a_file_that_cannot_be_opened_ends_nothing(data, tmp_path, caplog, name):
    if name == "tensorboard":
        (tmp_path / name).write_text("a file, not a folder")
    else:
        (tmp_path / name).mkdir()
    folder = open_folder(data, tmp_path, tensorboard=True)
    folder.append("train", 1, {"logloss": 0.5})
    folder.close()
    assert f"{tmp_path / name}" in caplog.text
    assert caplog.text.count("cannot be written") == 1


def test_a_summary_that_cannot_be_written_is_told(data, tmp_path, caplog):
    (tmp_path / "summary.json").mkdir()
    folder = open_folder(data, tmp_path)
    folder.write_summary({"num_steps": 1})
    folder.close()
    assert "the run is trained and saved, the same command again sums it up" in caplog.text


def events_of(path, tag):
    """A curve, as TensorBoard itself reads it."""
    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    events = EventAccumulator(str(path))
    events.Reload()
    return events.Scalars(tag)


def test_tensorboard_reads_its_events_and_hides_what_is_measured_again(data, tmp_path):
    for step, logloss in ((0, 0.5), (10, 0.25)):
        folder = open_folder(data, tmp_path, step, tensorboard=True)
        folder.append("train", 10, {"logloss": logloss, "position": {"epoch": 0}})
        folder.append("train", 11, {"logloss": logloss, "auc": float("nan")})
        folder.close()
    points = [(event.step, event.value) for event in events_of(tmp_path / "tensorboard", "train/logloss")]
    assert points == [(10, 0.5), (10, 0.25), (11, 0.25)], "of step 11 the second try's alone"


def test_what_is_no_number_is_null(data, tmp_path):
    folder = open_folder(data, tmp_path)
    folder.append("test", 1, {"auc": float("nan"), "logloss": float("inf"), "deep": [{"x": float("-inf")}]})
    folder.close()
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    expected = {"kind": "test", "step": 1, "auc": None, "logloss": None, "deep": [{"x": None}]}
    assert json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON")) == expected
    assert to_json((1, True, None, "NaN", 0.5)) == '[1, true, null, "NaN", 0.5]'


def test_jobs_that_begin_in_the_same_second_get_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr("papilio.trainer.run.folder.time.strftime", lambda *_: "20260102-030405")
    config, found = OutputConfig(runs_dir=str(tmp_path)), []
    for _ in range(3):
        found.append(choose_run_dir(config, "small"))
        os.mkdir(found[-1])
    first = f"{tmp_path}/small-20260102-030405"
    assert found == [first, f"{first}-2", f"{first}-3"]
