from pathlib import Path

import pytest

from papilio.trainer.elastic.memory_limit import memory_limit_bytes


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("own", "files", "limit"),
    [
        ("0::/\n", {"memory.max": "4294967296\n"}, 4_294_967_296),  # a container
        ("0::/slurm/job_7/step_0\n", {"slurm/memory.max": "max\n", "slurm/job_7/memory.max": "1000\n"}, 1_000),
        ("0::/a/b\n", {"a/memory.max": "500\n", "a/b/memory.max": "900\n"}, 500),  # the one around it counts, too
        ("0::/\n", {"memory.max": "max\n"}, None),
        ("5:cpu,memory:/a\n0::/\n", {"memory/a/memory.limit_in_bytes": "700\n"}, 700),  # version 1
        ("5:cpu:/a\n", {"cpu/a/cpu.shares": "1\n"}, None),
    ],
)
def test_the_least_limit_counts(tmp_path: Path, own: str, files: dict[str, str], limit: int | None) -> None:
    for name, text in files.items():
        write(tmp_path / "cgroups" / name, text)
    assert memory_limit_bytes(tmp_path / "cgroups", write(tmp_path / "own", own)) == limit


def test_a_system_without_cgroups_has_no_limit(tmp_path: Path) -> None:
    assert memory_limit_bytes(tmp_path, tmp_path / "no_such_file") is None
