"""`papilio checkpoint verify|prune|export-dense` on a real run, damaged and not."""

import json
import os
import zlib
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from papilio.launch.jobs import checkpoint_text
from papilio.trainer.checkpoint.folder import CheckpointFolder
from papilio.trainer.checkpoint.format import DamagedError
from papilio.trainer.run.lock import LOCK, Holder
from tests.support.checkpoint_runs import STEPS, aucs, flip, folders, num_bytes
from tests.support.checkpoints import saved_tensors, write_checkpoint

REPOSITORY = Path(__file__).resolve().parents[3]


def test_verify_reads_the_newest_unless_told_otherwise(papilio, run):
    names = [folder.name for folder in folders(run)]
    status, out, _ = papilio("verify", run)
    assert status == 0 and out.startswith(f"{names[-1]}  sound: {checkpoint_text.size(num_bytes(folders(run)[-1]))} ")
    assert [line.split()[0] for line in papilio("verify", run, "5", "best", "15")[1].splitlines()][::2] == names[::2][
        :2
    ]
    assert [line.split()[0] for line in papilio("verify", run, "--all")[1].splitlines()] == names
    assert "--all and names exclude each other" in papilio("verify", run, "5", "--all")[2]


PART = "rank_00001_part_00000.bin"


@pytest.mark.parametrize(
    ("file", "damage", "said"),
    [
        (PART, flip, [f"{PART} holds other bytes than were written\n    "]),
        (PART, lambda path: path.write_bytes(path.read_bytes()[:-4]), [f"{PART} has ", " bytes, not the ", "\n    "]),
        (PART, lambda path: path.write_bytes(path.read_bytes() + b"x"), [f"{PART} has ", " bytes, not the "]),
        (PART, Path.unlink, [f"{PART} is missing\n    "]),
        ("index.json", flip, ["index.json is damaged: its size or checksum is not what checkpoint.json says"]),
        ("index.json", Path.unlink, ["index.json is missing"]),
        ("plan.json", flip, ["plan.json is damaged: its size or checksum is not what checkpoint.json says"]),
        ("checkpoint.json", flip, ["checkpoint.json is damaged"]),
        (
            "checkpoint.json",
            lambda path: path.write_bytes(b""),
            ["checkpoint.json is damaged: it is not a checkpoint's"],
        ),
    ],
)
def test_verify_names_what_is_damaged(papilio, run, file, damage, said):
    folder = folders(run)[0]
    damage(folder / file)
    status, out, _ = papilio("verify", run, "--all")
    assert status == 1
    lines = out.splitlines()
    assert lines[0].startswith(f"{folder.name}  DAMAGED: ")
    assert sum("sound" in line for line in lines[1:-1]) == 3
    assert lines[-1] == "1 of 4 damaged; training resumes from the newest that is sound"
    report = out[: out.index(folders(run)[1].name)]
    assert all(words in report for words in said)


@pytest.mark.parametrize("seed", range(12))
def test_any_flipped_byte_is_found_and_its_tensor_named(papilio, run, seed):
    """The tensor that a byte belongs to is looked up in index.json by the format's description alone."""
    generator = np.random.default_rng(seed)
    folder = folders(run)[0]
    index = json.loads((folder / "index.json").read_text())
    number = int(generator.integers(len(index["files"])))
    path = folder / index["files"][number]
    position = int(generator.integers(path.stat().st_size))
    (owner,) = [
        key
        for key, entry in index["tensors"].items()
        for *_, file, start, length, _ in entry["blocks"]
        if file == number and start <= position < start + length
    ]
    flip(path, position)
    status, out, _ = papilio("verify", run, "5")
    assert status == 1
    assert out.splitlines()[1:3] == [
        f"  {path.name} holds other bytes than were written",
        *[line for line in out.splitlines() if line.startswith(f"    {owner}")],
    ]


def test_a_file_of_many_tensors_is_told_by_tables(papilio, run):
    (folders(run)[-1] / "rank_00000_part_00000.bin").unlink()
    out = papilio("verify", run)[1]
    assert f"concerns {len(saved_keys(run))} tensors: t_a, t_b, t_m, the dense part" in " ".join(out.split())


@pytest.mark.parametrize("copy", [0, 1])
def test_verify_names_the_copy_of_the_model_that_is_damaged(papilio, tmp_path, copy):
    """Groups with tables of their own; a table with a slash in its name."""
    copies = [{"tables.t_a/b.weight": np.zeros((2, 4), "float32")} for _ in range(2)]
    flip(write_checkpoint(tmp_path, copies, num_copies=2) / f"group_{copy}" / "r.bin")
    status, out, _ = papilio("verify", tmp_path)
    assert status == 1 and out.splitlines()[1:3] == [
        f"  group_{copy}/r.bin holds other bytes than were written",
        f"    group_{copy}/tables.t_a/b.weight [0:2, 0:4]",
    ]


def saved_keys(run):
    return json.loads((folders(run)[-1] / "index.json").read_text())["tensors"]


def test_prune_keeps_what_it_is_told_to(papilio, run):
    names = [folder.name for folder in folders(run)]
    best = names[max(range(4), key=lambda i: aucs(run)[STEPS[i]])]
    sizes = dict(zip(names, map(num_bytes, folders(run)), strict=True))
    kept = {names[-1], best}
    _, out, _ = papilio("prune", run, "--keep-last", "1", "--keep-best", "--dry-run")
    freed = checkpoint_text.size(sum(sizes[name] for name in names if name not in kept))
    assert [line.split("  ")[0] for line in out.splitlines()[:-1]] == [
        "would stay" if name in kept else "would go" for name in names
    ]
    assert out.splitlines()[-1] == f"{freed} would be freed; nothing was removed"
    assert len(folders(run)) == 4
    status, out, _ = papilio("prune", run, "--keep-last", "1", "--keep-best")
    assert status == 0 and out.splitlines()[-1] == f"{freed} freed"
    assert {folder.name for folder in folders(run)} == kept
    assert papilio("prune", run, "--keep-last", "1", "--keep-best")[1].splitlines()[-1] == "0 B freed"


def test_prune_leaves_a_folder_that_a_job_is_in(papilio, run):
    before = folders(run)
    lock = run / "checkpoints" / LOCK
    lock.write_bytes(Holder.here("train-x7").to_bytes())
    status, _, error = papilio("prune", run, "--keep-last", "1")
    assert status == 1 and "is in use by job train-x7 (host " in error and "nothing was removed" in error
    assert papilio("prune", run, "--keep-last", "1", "--dry-run")[0] == 0
    lock.unlink()
    assert folders(run) == before


@pytest.mark.parametrize("damage", ["", "{", "pipe"])
def test_prune_takes_no_damaged_lock_for_nobodys(papilio, run, damage):
    before = folders(run)
    lock = run / "checkpoints" / LOCK
    if damage == "pipe":
        os.mkfifo(lock)
    else:
        lock.write_text(damage)
    status, _, error = papilio("prune", run, "--keep-last", "1")
    lock.unlink()
    assert status == 1 and len(error.splitlines()) == 1 and f"{lock} is " in error
    assert "nothing was removed. See that none trains there, remove what lies there" in error
    assert folders(run) == before


def test_prune_never_leaves_a_run_without_a_sound_checkpoint(papilio, run):
    status, _, error = papilio("prune", run, "--keep-last", "0")
    assert status == 2 and "--keep-last 0 would leave no complete checkpoint to resume from; keep 1 or more" in error
    (folders(run)[-1] / "rank_00000_part_00000.bin").unlink()
    status, _, error = papilio("prune", run, "--keep-last", "1")
    assert status == 1 and "nothing was removed, since none of what would stay is sound: " in error
    assert "rank_00000_part_00000.bin is missing" in error
    assert len(folders(run)) == 4
    assert papilio("prune", run, "--keep-last", "2")[0] == 0
    assert len(folders(run)) == 2


def test_prune_leaves_and_names_what_is_not_complete(papilio, run):
    (folders(run)[0] / "checkpoint.json").unlink()
    flip(folders(run)[1] / "checkpoint.json")
    status, out, _ = papilio("prune", run, "--keep-last", "1")
    assert status == 0 and len(folders(run)) == 3
    assert f"{folders(run)[0]} is incomplete and was left; the next start of the job removes it" in out
    assert f"{folders(run)[1]} is damaged and was left; remove it by hand if nobody needs it" in out


def test_export_writes_what_the_index_says(papilio, run, tmp_path):
    status, out, _ = papilio(
        "export-dense", run, "5", "--output", tmp_path / "out", "--optimizer", "--tables", "t_[ab]"
    )
    assert status == 0
    assert out.startswith(f"{tmp_path}/out: 3 files, ")
    arrays = saved_tensors(folders(run)[0])
    for table in ("t_a", "t_b"):
        found = load_file(tmp_path / "out" / f"{table}.safetensors")
        assert sorted(found) == ["row_wise.sum", "weight"]
        for name, values in found.items():
            np.testing.assert_array_equal(values, arrays[f"tables.{table}.{name}"])
    assert not (tmp_path / "out" / "t_m.safetensors").exists()
    status, _, error = papilio("export-dense", run, "--output", tmp_path / "out")
    assert status == 1 and "out exists and is not empty; choose another --output, or remove it" in error


def change_marker(folder, change):
    """Change what a marker says, and its checksum with it."""
    path = folder / "checkpoint.json"
    content = json.loads(path.read_text())["checkpoint"]
    change(content)
    crc32 = zlib.crc32(json.dumps(content, sort_keys=True).encode())
    path.write_text(json.dumps({"crc32": crc32, "checkpoint": content}))


def test_names_in_a_checkpoint_never_leave_its_folder(papilio, run, tmp_path):
    folder = folders(run)[0]
    marker = (folder / "checkpoint.json").read_bytes()
    change_marker(folder, lambda content: content["files"].update({"../x": [1, None]}))
    status, out, _ = papilio("verify", run, "5")
    assert status == 1 and "file name '../x' leads out of its folder" in " ".join(out.split())
    index = json.loads((folder / "index.json").read_text())
    index["files"][0] = "/etc/hostname"
    raw = json.dumps(index).encode()
    (folder / "checkpoint.json").write_bytes(marker)
    (folder / "index.json").write_bytes(raw)
    change_marker(folder, lambda content: content["files"].update({"index.json": [len(raw), zlib.crc32(raw)]}))
    with pytest.raises(DamagedError, match=r"places values in '/etc/hostname', not listed in checkpoint.json"):
        checkpoints = CheckpointFolder(str(folder.parent))
        checkpoints.read_index(folder.name, checkpoints.read_marker(folder.name))
    status, out, _ = papilio("verify", run, "5")
    assert status == 1 and "places values in '/etc/hostname', not listed in checkpoint.json" in " ".join(out.split())


def test_a_part_that_is_a_link_to_elsewhere_is_damage(papilio, run, tmp_path):
    folder = folders(run)[0]
    part = folder / json.loads((folder / "index.json").read_text())["files"][0]
    part.rename(tmp_path / "elsewhere.bin")
    part.symlink_to(tmp_path / "elsewhere.bin")
    status, out, _ = papilio("verify", run, "5")
    assert status == 1 and f"is a link to {tmp_path / 'elsewhere.bin'}, outside of its folder" in " ".join(out.split())


@pytest.mark.parametrize("text", ["[]", '{"files": []}', '{"files": [], "tensors": {"a": 1}}', "[" * 100_000, "\xff"])
def test_an_index_that_is_none_is_damage_though_its_checksum_is_right(papilio, run, text):
    folder, raw = folders(run)[0], text.encode("latin-1")
    (folder / "index.json").write_bytes(raw)
    change_marker(folder, lambda content: content["files"].update({"index.json": [len(raw), zlib.crc32(raw)]}))
    status, out, _ = papilio("verify", run, "5")
    assert status == 1 and "index.json is damaged: it is no index of tensors" in " ".join(out.split())
