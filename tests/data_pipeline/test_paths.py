from pathlib import Path

import pytest

from papilio.data_pipeline.paths import path_manager, replace


def test_a_local_file_is_replaced_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Removing the older file first would leave none if the process dies between."""
    (tmp_path / "x").write_text("older")
    (tmp_path / "x.tmp").write_text("newer")
    monkeypatch.setattr(path_manager, "rm", lambda path: pytest.fail("removed first"))
    replace(f"{tmp_path}/x.tmp", f"{tmp_path}/x")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("x", "newer")]
