"""The one family of errors: who belongs to it, and what each means for a retry and for the exit status."""

import ast
import errno
import importlib
import os
from pathlib import Path

import pytest

from papilio.data_pipeline.errors import PapilioError, report_error
from papilio.trainer.storage.retries import StorageError

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = ("data_pipeline", "launch", "sharding", "trainer")
# Classes whose errors may go better another time; all others come again until somebody changes something.
RETRYABLE = {"LostRankError", "MeetingError", "OverloadError", "SaveError", "SilenceError", "TryAgainError"}
EXIT_STATUSES = {"UsageError": 2, "launch.schedulers.errors.RequestError": 2, "RefusedError": 78, "StartError": 78}


def error_classes() -> list[tuple[str, str]]:
    """Every class of papilio that is an exception, by its bases: (module, name)."""
    found = []
    for path in sorted(path for package in PACKAGES for path in (REPOSITORY / package).rglob("*.py")):
        module = ".".join(path.relative_to(REPOSITORY).with_suffix("").parts)
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ClassDef):
                bases = [ast.unparse(base) for base in node.bases]
                if any(base.endswith(("Error", "Exception", "Exit", "Interrupt", "Warning")) for base in bases):
                    found.append((module, node.name))
    return [found_class for found_class in found if found_class != ("data_pipeline.errors", "PapilioError")]


def test_there_are_errors_to_check() -> None:
    assert ("trainer.storage.retries", "StorageError") in error_classes()
    assert len(error_classes()) > 40


@pytest.mark.parametrize(("module", "name"), error_classes())
def test_every_error_is_of_the_family_and_says_what_it_means(module: str, name: str) -> None:
    error_class = getattr(importlib.import_module(f"papilio.{module}"), name)
    assert issubclass(error_class, PapilioError)
    assert error_class.is_retryable is (name in RETRYABLE)
    assert error_class.exit_status == EXIT_STATUSES.get(f"{module}.{name}", EXIT_STATUSES.get(name, 1))


@pytest.mark.parametrize(
    ("number", "is_transient", "is_retryable"),
    [
        (errno.ETIMEDOUT, None, True),
        (errno.ENOSPC, None, True),
        (errno.EACCES, None, False),
        (None, None, False),
        (None, True, True),
        (errno.ETIMEDOUT, False, False),
    ],
)
def test_a_storage_error_is_retryable_by_its_errno_or_as_its_storage_says(
    number: int | None, is_transient: bool | None, is_retryable: bool
) -> None:
    error = StorageError("timed out", number, is_transient=is_transient)
    assert error.is_retryable is is_retryable
    assert error.rank_exit_status == (1 if is_retryable else os.EX_CONFIG)


def test_an_error_is_reported_in_one_line_with_its_status(capsys: pytest.CaptureFixture[str]) -> None:
    assert report_error("papilio plan", PapilioError("table t does not fit; use row_wise")) == 1
    assert capsys.readouterr().err == "papilio plan: error: table t does not fit; use row_wise\n"
