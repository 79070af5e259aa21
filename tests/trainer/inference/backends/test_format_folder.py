"""What a format says of itself, who built it, and what `verify` finds; formats here are a few bytes, so no torch."""

import json
import math
import os
import random
import shutil
import zlib
from pathlib import Path

import pytest

from papilio.launch.cli import main
from papilio.trainer.inference.backends.format_folder import (
    BackendFigures,
    Choice,
    Made,
    read_format,
    verify_formats,
    write_format,
)
from papilio.trainer.inference.package.format import PackageError, read_package
from tests.support.package_bytes import rewrite_format
from tests.trainer.inference.package.test_format import write_package

BACKENDS = {
    "aoti_fp32": BackendFigures(dense="fp32", median_ms={"1": 0.5}),
    "slow": BackendFigures(dense="bf16", refusal="slow"),
}
CHOICE = Choice(
    up_to=((8, "eager"), (64, "aoti_fp32")),
    ways={"eager": BackendFigures(dense="fp32"), **BACKENDS},
    num_threads=1,
    num_samples=9,
    min_auc_ratio=0.999,
    held_out=None,
)


def build(folder):
    Path(folder, "aoti_fp32").mkdir()
    Path(folder, "aoti_fp32", "model.pt2").write_bytes(b"machine code")
    return Made({"torch": "2"}, ("avx2",), CHOICE)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package with a format that was built by this user."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    (tmp_path / "package").mkdir()
    write_package(tmp_path / "package")
    package = read_package(str(tmp_path / "package"))
    write_format(package, "fastest", build)
    return package


def problems(package):
    return {file: problem for file, problem in verify_formats(package) if problem is not None}


def open_it(package, *, trusts_formats=False):
    return read_format(package, "fastest", trusts_formats=trusts_formats)


def test_what_was_built_here_is_opened_wherever_it_is_moved_to(package, tmp_path):
    assert open_it(package).choice == CHOICE
    assert problems(package) == {}
    shutil.copytree(package.folder, tmp_path / "copy")
    assert open_it(read_package(str(tmp_path / "copy"))).choice == CHOICE


def test_what_others_built_is_opened_only_if_trusted(package, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "of_another_user"))
    with pytest.raises(PackageError) as refused:
        open_it(package)
    assert str(refused.value) == (
        f"format fastest of {package.folder} was not built by this user on this machine, and to open it would run its "
        f"builder's code; `papilio package build {package.folder} --format fastest` here, or pass --trust-formats if "
        "you trust whoever built it"
    )
    assert open_it(package, trusts_formats=True).choice == CHOICE
    write_format(package, "fastest", build)
    assert open_it(package).choice == CHOICE


def test_other_code_with_right_checksums_is_not_what_was_built_here(package):
    path = Path(package.folder, "formats", "fastest", "aoti_fp32", "model.pt2")
    path.write_bytes(b"foreign code")
    with pytest.raises(PackageError, match=r"model.pt2: is damaged: its checksum is not what format.json says"):
        open_it(package, trusts_formats=True)
    files = json.loads((path.parents[1] / "format.json").read_text())["files"]
    entry = {"num_bytes": 12, "crc32": zlib.crc32(b"foreign code")}
    rewrite_format(package.folder, "fastest", files=files | {"aoti_fp32/model.pt2": entry})
    with pytest.raises(PackageError, match="was not built by this user on this machine"):
        open_it(package)
    assert problems(package) == {}


def test_a_link_in_a_format_is_never_followed(package, tmp_path):
    path = Path(package.folder, "formats", "fastest", "aoti_fp32", "model.pt2")
    os.rename(path, tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", path)
    with pytest.raises(PackageError, match=r"is a link to .*elsewhere, outside of its folder"):
        open_it(package, trusts_formats=True)
    os.unlink(path)
    os.rename(tmp_path / "elsewhere", path)
    os.symlink("model.pt2", path.with_name("second"))
    with pytest.raises(PackageError, match=r"second: is not listed in format\.json"):
        open_it(package, trusts_formats=True)
    os.unlink(path.with_name("second"))
    info = Path(package.folder, "formats", "fastest", "format.json")
    os.rename(info, tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", info)
    with pytest.raises(PackageError, match=r"format\.json is a link to .*elsewhere, outside of its folder"):
        open_it(package, trusts_formats=True)


def test_notes_are_never_looked_for_in_the_working_folder(package, monkeypatch, tmp_path):
    """A relative XDG_STATE_HOME, or a user without a home, would let a stranger's folder decide."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", "state")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with pytest.raises(PackageError, match="was not built by this user"):
        open_it(package)
    monkeypatch.setenv("HOME", "")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    os.rename(tmp_path / "state", tmp_path / "~")
    with pytest.raises(PackageError, match="was not built by this user"):
        open_it(package)


def test_a_build_that_cannot_be_noted_says_so(package, monkeypatch, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    write_format(package, "fastest", build)
    assert "was built here cannot be noted" in caplog.text and "--trust-formats only; set XDG_STATE_HOME" in caplog.text
    with pytest.raises(PackageError, match="was not built by this user"):
        open_it(package)


def test_a_flipped_bit_anywhere_in_a_format_is_found(package):
    missed = []
    for name in ("format.json", "aoti_fp32/model.pt2"):
        path = Path(package.folder, "formats", "fastest", name)
        raw = path.read_bytes()
        for place in range(len(raw)):
            path.write_bytes(raw[:place] + bytes([raw[place] ^ 1 << place % 8]) + raw[place + 1 :])
            if not problems(package):
                missed.append((name, place))
        path.write_bytes(raw)
    assert missed == []
    assert problems(package) == {}


def places_of(tree, path=()):
    """All keys and list places of a JSON tree, whatever their depth."""
    for key in list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ():
        yield (*path, key)
        yield from places_of(tree[key], (*path, key))


@pytest.mark.parametrize("has_checksum", [False, True])
def test_a_field_of_another_type_is_found(package, has_checksum):
    """With the right checksum, too: then by the schema alone."""
    path = Path(package.folder, "formats", "fastest", "format.json")
    raw, generator = path.read_text(), random.Random(0)
    for place in places_of(json.loads(raw)):
        tree = json.loads(raw)
        parent = tree
        for key in place[:-1]:
            parent = parent[key]
        old = parent[place[-1]]
        # Of another JSON type than any field here has, so that it cannot be right by chance.
        parent[place[-1]] = generator.choice([[[]], True, {"a": []}]) if old != "crc32" else None
        path.write_text(json.dumps(tree))
        if has_checksum and place != ("crc32",):
            rewrite_format(package.folder, "fastest")
        assert len(problems(package)) >= 1, place
    path.write_text(raw)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "torch", "choice": None}, "is format torch under another name"),
        ({"name": "tensorrt"}, r"is damaged \(name: Input should be 'fastest', 'aoti'"),
        ({"package_crc32": "1"}, r"is damaged \(package_crc32: Input should be a valid integer"),
        ({"package_crc32": 2**32}, r"is damaged \(package_crc32: "),
        ({"package_crc32": 1}, "was built from another package.json than that of"),
        ({"more": 1}, r"is damaged \(more: Extra inputs are not permitted"),
        ({"choice": None}, "format fastest has no choice of backends"),
        ({"choice": {"num_threads": 0}}, r"is damaged \(choice.num_threads: "),
        ({"choice": {"min_auc_ratio": math.nan}}, "is damaged"),
        ({"choice": {"up_to": []}}, r"is damaged \(choice.up_to: "),
        ({"choice": {"up_to": [[8, "eager"], [8, "aoti_fp32"]]}}, r"batch sizes \[8, 8\] must ascend"),
        ({"choice": {"up_to": [[8, "other"]]}}, "backend other is chosen, and is not among those"),
        ({"choice": {"up_to": [[8, "slow"]]}}, "backend slow is chosen, and is not among those"),
        ({"files": {"../model.pt2": {"num_bytes": 1, "crc32": 1}}}, "file name '../model.pt2' leads out of its folder"),
        ({"files": {"/tmp/x.so": {"num_bytes": 1, "crc32": 1}}}, "file name '/tmp/x.so' leads out of its folder"),
        ({"info_version": 1}, "has version 1; this Papilio reads 2: "),
    ],
)
def test_a_format_that_says_what_it_may_not_is_refused_by_key(package, changes, message):
    info = json.loads(Path(package.folder, "formats", "fastest", "format.json").read_text())
    if changes.get("choice"):
        changes = {"choice": info["choice"] | changes["choice"]}
    rewrite_format(package.folder, "fastest", **changes)
    with pytest.raises(PackageError, match=message) as refused:
        open_it(package, trusts_formats=True)
    assert "papilio package build" in str(refused.value) and "\n" not in str(refused.value)
    assert next(iter(problems(package))) == "formats/fastest/format.json"


def remove_info(folder):
    (folder / "fastest" / "format.json").unlink()


def remove_model(folder):
    (folder / "fastest" / "aoti_fp32" / "model.pt2").unlink()


def add_file(folder):
    (folder / "fastest" / "extra.so").write_bytes(b"x")


def rename(folder):
    os.rename(folder / "fastest", folder / "fast")


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (remove_info, "fastest/format.json is missing"),
        (remove_model, "fastest/aoti_fp32/model.pt2 is missing"),
        (add_file, "fastest/extra.so is not listed in format.json"),
        (rename, "fast is no format; there are fastest, aoti, torch, onnx: remove it"),
    ],
)
def test_verify_gives_one_verdict_last(package, damage, line, capsys):
    assert main(["package", "verify", package.folder]) == 0
    assert capsys.readouterr().out.startswith(f"{package.folder}  sound: ")
    damage(Path(package.folder, "formats"))
    assert main(["package", "verify", package.folder]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"  {package.folder}/formats/{line}"
    assert lines[1].startswith(f"{package.folder}  DAMAGED: formats/fast")
    assert len(lines) == 2 and "sound" not in "".join(lines)


def test_what_a_killed_build_left_goes_with_the_next_one(package):
    folder = Path(package.folder, "formats")
    (folder / ".aoti-0123ab").mkdir()
    (folder / ".notes").mkdir()
    write_format(package, "fastest", build)
    assert sorted(os.listdir(folder)) == [".notes", "fastest"]
    assert problems(package) == {}
