"""One family: whoever catches PapilioError has every error that the code foresees, and none that it does not."""

import ast
import errno
import os
import pickle

import pytest

from papilio.data_pipeline.errors import PapilioError
from papilio.launch.usage import RefusedError, UsageError
from papilio.trainer.checkpoint.saver import SaveError
from papilio.trainer.config_file import ConfigError
from papilio.trainer.elastic.exit_codes import NO_RESTART_EXIT_CODE
from papilio.trainer.elastic.health.failures import LostRankError
from papilio.trainer.storage.retries import StorageError
from tests.test_architecture import MODULES, PACKAGES

# In a class's bases: builtin exceptions, those of libraries, and ours.
ENDINGS = ("Error", "Exception", "Exit", "Interrupt", "Warning", "StopIteration")


def exception_classes() -> dict[str, list[str]]:
    """The bases of every class of the packages that is an exception, by the name of its module and its own."""
    return {
        f"{module}.{node.name}": [ast.unparse(base).rpartition(".")[2] for base in node.bases]
        for module, tree in MODULES.items()
        if module.partition(".")[0] in PACKAGES
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and any(ast.unparse(base).endswith(ENDINGS) for base in node.bases)
    }


def test_every_exception_class_is_of_the_family() -> None:
    classes = exception_classes()
    assert classes.pop("data_pipeline.errors.PapilioError") == ["Exception"]
    assert len(classes) > 40
    family = {"PapilioError"}
    while found := {name for name, bases in classes.items() if family & set(bases)}:
        family |= {name.rpartition(".")[2] for name in found}
        for name in found:
            del classes[name]
    assert not classes, "derive them from papilio.data_pipeline.errors.PapilioError, too"


@pytest.mark.parametrize(
    ("error", "builtin", "is_retryable", "exit_status"),
    [
        (ConfigError("m"), ValueError, False, NO_RESTART_EXIT_CODE),
        (RefusedError("m"), ValueError, False, NO_RESTART_EXIT_CODE),
        (UsageError("m"), ValueError, False, 2),
        (LostRankError("m"), RuntimeError, True, 1),
        (SaveError("m"), RuntimeError, True, 1),
        (StorageError("m", errno.EACCES), OSError, False, os.EX_CONFIG),
        (StorageError("m", errno.ENOSPC), OSError, True, 1),
        (StorageError("m", errno.ETIMEDOUT), OSError, True, 1),
        (StorageError("m", is_transient=True), OSError, True, 1),
    ],
)
def test_an_error_knows_whether_a_restart_helps(
    error: PapilioError, builtin: type[Exception], is_retryable: bool, exit_status: int
) -> None:
    assert isinstance(error, PapilioError)
    assert isinstance(error, builtin)
    for found in (error, pickle.loads(pickle.dumps(error))):  # as it goes to other ranks
        assert (str(found), found.is_retryable, found.exit_status) == ("m", is_retryable, exit_status)
