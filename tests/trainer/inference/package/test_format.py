"""What a package is on disk: read back, and refused by name when it is not what was written."""

import json
import os
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

from papilio.trainer.inference.package.format import (
    MANIFEST,
    TABLES,
    FileEntry,
    PackageError,
    PackageManifest,
    RowError,
    Source,
    TableEntry,
    describe_files,
    read_manifest,
    read_package,
    row_bytes,
    table_offsets,
    verify_package,
    write_manifest,
)

FILES = {TABLES: bytes(range(250)), "dense.safetensors": b"dense", "vocabulary/a.npy": b"words"}


def table(name="t_a", **changes):
    entry = {"name": name, "feature": name[2:], "rows": 10, "dim": 8, "pooling": "sum", "precision": "int8"}
    entry |= {"quantizer": "minmax", "offset": 0, "row_bytes": 12, "row_error": RowError()}
    return TableEntry(**(entry | changes))


def write_package(folder, **changes):
    for name, data in FILES.items():
        Path(folder, name).parent.mkdir(parents=True, exist_ok=True)
        Path(folder, name).write_bytes(data)
    manifest = PackageManifest(
        papilio_version="1.2",
        transform_version=1,
        made_at="2026-01-01T00:00:00+00:00",
        name="small",
        architecture="dlrm",
        dense_features=("x", "y"),
        tables=(table(), table("t_b", offset=128, precision="fp16", quantizer=None, rows=7, row_bytes=16)),
        source=Source(run="r", checkpoint="c", step=3, data="d"),
        versions={"torch": "2"},
        files=describe_files(str(folder), list(FILES)),
    ).model_copy(update=changes)
    write_manifest(manifest, str(folder))
    return manifest


def test_what_was_written_is_read(tmp_path):
    manifest = write_package(tmp_path)
    package = read_package(f"{tmp_path}/")
    assert package.manifest == manifest == read_manifest(str(tmp_path))
    assert package.folder == str(tmp_path)
    assert manifest.features == ["a", "b"]
    assert manifest.num_bytes == sum(map(len, FILES.values()))
    assert [entry.num_bytes for entry in manifest.tables] == [120, 112]
    assert [entry.fp32_bytes for entry in manifest.tables] == [320, 224]
    assert manifest.files[TABLES] == FileEntry(num_bytes=250, crc32=zlib.crc32(FILES[TABLES]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense.safetensors", MANIFEST, TABLES, "vocabulary"]


@pytest.mark.parametrize(
    ("precision", "dim", "expected"),
    [("fp32", 16, 64), ("fp16", 16, 32), ("int8", 16, 20), ("int4", 16, 12), ("int2", 16, 8), ("int2", 4, 5)],
)
def test_bytes_of_a_row(precision, dim, expected):
    assert row_bytes(precision, dim) == expected


def test_tables_begin_at_multiples_of_64():
    assert table_offsets([100, 64, 1, 5]) == [0, 128, 192, 256, 261]
    assert table_offsets([]) == [0]


def test_no_package_is_refused(tmp_path):
    with pytest.raises(PackageError, match="nowhere does not exist; `papilio export --run RUN_DIR --output DIR` makes"):
        read_package(str(tmp_path / "nowhere"))
    with pytest.raises(PackageError, match=r"is not a package: it has no package.json; `papilio export"):
        read_package(str(tmp_path))
    (tmp_path / "file").write_text("")
    with pytest.raises(PackageError, match="file is a file, not a package; `papilio export"):
        list(verify_package(str(tmp_path / "file")))


def change_manifest(folder, change):
    """Change the manifest's contents, and its checksum with them."""
    path = Path(folder, MANIFEST)
    content = json.loads(path.read_text())["package"]
    change(content)
    crc32 = zlib.crc32(json.dumps(content, sort_keys=True).encode())
    path.write_text(json.dumps({"crc32": crc32, "package": content}))


def test_another_version_is_refused_by_name(tmp_path):
    write_package(tmp_path)
    change_manifest(tmp_path, lambda content: content.update(format_version=2, something="new"))
    message = "has format version 2; this Papilio reads 1: export the run again, or use the Papilio that wrote it .1.2."
    for read in (read_package, read_manifest, lambda folder: list(verify_package(folder))):
        with pytest.raises(PackageError, match=message):
            read(str(tmp_path))


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"package": 1, "crc32": 0}', '{"package": {}, "crc32": 0}', "\x00\xff"]
)
def test_a_manifest_that_is_none_is_refused(tmp_path, text):
    write_package(tmp_path)
    Path(tmp_path, MANIFEST).write_text(text)
    with pytest.raises(PackageError, match=f"{MANIFEST} is damaged: it is not the manifest of a package"):
        read_package(str(tmp_path))


def test_a_changed_manifest_is_refused(tmp_path):
    write_package(tmp_path)
    path = Path(tmp_path, MANIFEST)
    path.write_text(path.read_text().replace('"rows": 10', '"rows": 11'))
    with pytest.raises(PackageError, match="is damaged: its checksum is wrong; export it again"):
        read_package(str(tmp_path))


def test_a_manifest_with_a_wrong_entry_is_refused_by_its_key(tmp_path):
    write_package(tmp_path)
    change_manifest(tmp_path, lambda content: content["tables"][1].update(precision="int3"))
    with pytest.raises(PackageError, match=r"is damaged \(tables.1.precision: Input should be 'fp32', 'fp16'"):
        read_package(str(tmp_path))


@pytest.mark.parametrize("name", FILES)
def test_a_missing_or_cut_file_is_refused_by_name(tmp_path, name):
    write_package(tmp_path)
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:-1])
    size = len(FILES[name])
    with pytest.raises(
        PackageError, match=f"{name} has {size - 1} bytes, not the {size} written; export it again, or copy"
    ):
        read_package(str(tmp_path))
    path.unlink()
    with pytest.raises(PackageError, match=f"{name} is missing; export it again"):
        read_package(str(tmp_path))


@pytest.mark.parametrize("change", [{"offset": 192}, {"rows": 1 << 40}, {"row_bytes": 32}, {"dim": 16}])
def test_a_table_outside_of_its_file_is_refused(tmp_path, change):
    """Lookups trust these figures: a wrong one would read other memory."""
    write_package(
        tmp_path, tables=(table(), table("t_b", **{"precision": "fp16", "rows": 7, "row_bytes": 16} | change))
    )
    with pytest.raises(
        PackageError, match=r"places t_b at byte [0-9,]* with .* bytes a row, which does not fit tables.bin"
    ):
        read_package(str(tmp_path))


@pytest.mark.parametrize("name", FILES)
def test_verify_finds_a_changed_byte_in_any_file(tmp_path, name):
    write_package(tmp_path)
    read = []
    assert [problem for _, problem in verify_package(str(tmp_path), read.append)] == [None] * 4
    assert sum(read) == sum(map(len, FILES.values()))
    data = bytearray(FILES[name])
    data[-1] ^= 1
    (tmp_path / name).write_bytes(data)
    read_package(str(tmp_path))
    problems = dict(verify_package(str(tmp_path)))
    assert problems.pop(name) == f"{tmp_path / name} is damaged: its checksum is not what {MANIFEST} says"
    assert set(problems.values()) == {None}


def test_json_of_a_package_is_checked_when_read(tmp_path):
    write_package(tmp_path)
    package = read_package(str(tmp_path))
    with pytest.raises(PackageError, match=r"dense.safetensors is damaged: its size or checksum is not what"):
        (tmp_path / "dense.safetensors").write_bytes(b"DENSE")
        package.read_json("dense.safetensors")


def test_reading_a_package_imports_no_torch(tmp_path):
    write_package(tmp_path)
    code = (
        "import sys; from papilio.trainer.inference.package.format import read_package, verify_package\n"
        f"read_package({str(tmp_path)!r}); list(verify_package({str(tmp_path)!r}))\n"
        "assert not {'torch', 'torchrec', 'numpy', 'pickle'} & set(sys.modules), 'imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("name", ["../secret", "/etc/hosts", "a/../../b", "", "a//b", "./a"])
def test_a_name_that_leads_out_of_the_package_is_refused(tmp_path, name):
    write_package(tmp_path)
    change_manifest(tmp_path, lambda content: content["files"].update({name: content["files"][TABLES]}))
    with pytest.raises(PackageError, match=r"is damaged \(files\..*(leads out of its folder|is no file name)"):
        read_package(str(tmp_path))


def test_a_link_that_leads_out_of_the_package_is_refused(tmp_path):
    folder = tmp_path / "package"
    folder.mkdir()
    write_package(folder)
    os.rename(folder / TABLES, tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", folder / TABLES)
    message = f"{TABLES} is a link to {tmp_path / 'elsewhere'}, outside of its folder; copy the file to its place"
    with pytest.raises(PackageError, match=message):
        read_package(str(folder))
    assert message in dict(verify_package(str(folder)))[TABLES]
    os.symlink(folder, tmp_path / "current")  # a link to the whole package leads nowhere else
    os.replace(tmp_path / "elsewhere", folder / TABLES)
    read_package(str(tmp_path / "current")).require_sound()
    os.rename(folder / MANIFEST, tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", folder / MANIFEST)
    with pytest.raises(PackageError, match=f"{MANIFEST} is a link to .*elsewhere, outside of its folder"):
        read_package(str(folder))


def test_a_file_is_read_before_its_path_is_given_out_and_only_once(tmp_path, monkeypatch):
    write_package(tmp_path)
    package = read_package(str(tmp_path))
    assert package.checked_path(TABLES) == str(tmp_path / TABLES)
    monkeypatch.setattr("papilio.trainer.inference.package.format.file_crc32", None)
    package.checked_path(TABLES)
    monkeypatch.undo()
    (tmp_path / "dense.safetensors").write_bytes(b"dEnse")
    with pytest.raises(PackageError, match=r"dense.safetensors is damaged: its checksum is not .*; export it again"):
        package.checked_path("dense.safetensors")
    with pytest.raises(PackageError, match=r"lists no sample.json, which is needed here; export the run again"):
        package.read_json("sample.json")


def test_a_flipped_bit_anywhere_in_the_manifest_is_found(tmp_path):
    write_package(tmp_path)
    path = tmp_path / MANIFEST
    raw = path.read_bytes()
    passed = []
    for place in range(len(raw)):
        path.write_bytes(raw[:place] + bytes([raw[place] ^ 1 << place % 8]) + raw[place + 1 :])
        try:
            read_manifest(str(tmp_path))
            passed.append(place)
        except PackageError as error:
            assert "\n" not in str(error)
    assert passed == []


def test_a_manifest_that_says_more_than_it_should_is_refused(tmp_path):
    write_package(tmp_path)
    path = tmp_path / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), "more": 1}))
    with pytest.raises(PackageError, match="is damaged: its checksum is wrong"):
        read_package(str(tmp_path))
    write_package(tmp_path)
    change_manifest(tmp_path, lambda content: content["tables"][0].update(rows="10"))
    with pytest.raises(PackageError, match=r"is damaged \(tables.0.rows: Input should be a valid integer\)"):
        read_package(str(tmp_path))
    path.write_text("[" * 100_000)
    with pytest.raises(PackageError, match="is damaged: it is not the manifest of a package"):
        read_package(str(tmp_path))
