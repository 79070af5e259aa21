"""Private names of torch that training and inference need; those of its elastic agent are in torch_elastic_internals.

Importing this module loads nothing beside torch: inference loads it, too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.fx.experimental import _config as export_config

from papilio.sharding.compat.private_name import PrivateName

NEEDED = (
    PrivateName("torch.autograd", "_profiler_enabled", "to skip annotations while no profiler runs", ()),
    PrivateName("torch.distributed.distributed_c10d", "_world", "to count collectives in all groups"),
    PrivateName("torch.distributed.distributed_c10d._World", "pg_map", "to count collectives in all groups"),
    PrivateName(
        "torch.distributed.ProcessGroup", "_get_sequence_number_for_group", "to count collectives in all groups"
    ),
    *(
        PrivateName("torch.distributed._checkpointable._Checkpointable", name, "to save and load shards", parameters)
        for name, parameters in (
            ("__create_write_items__", ("self", "fqn", "object")),
            ("__create_chunk_list__", ("self",)),
        )
    ),
    PrivateName("torch.fx.experimental._config", "backed_size_oblivious", "to export programs for any batch size"),
    PrivateName(
        "torch._inductor",
        "aoti_compile_and_package",
        "to compile a package's format aoti",
        ("exported_program",),
    ),
    PrivateName("torch._C._aoti", "AOTIModelPackageLoader", "to load the format aoti without a compiler"),
    PrivateName("torch._C._aoti.AOTIModelPackageLoader", "boxed_run", "to run the format aoti"),
)


def is_profiling() -> bool:
    """Say whether a profiler records; `torch.profiler` has no public question for it."""
    return bool(torch.autograd._profiler_enabled())


def num_collectives() -> int:
    """Return how many collectives were begun in all groups of this process; torch has a public name for neither."""
    count = 0
    for group in list(dist.distributed_c10d._world.pg_map):
        with contextlib.suppress(RuntimeError):  # a backend that does not count
            count += group._get_sequence_number_for_group()  # type: ignore[attr-defined]
    return count


@contextmanager
def any_batch_size() -> Iterator[None]:
    """Export programs that take one sample, too: else torch 2.13 specializes on sizes of 0 and 1."""
    before = export_config.backed_size_oblivious
    export_config.backed_size_oblivious = True
    try:
        yield
    finally:
        export_config.backed_size_oblivious = before


def compile_and_package(program: torch.export.ExportedProgram, path: str, inductor_settings: dict[str, Any]) -> None:
    """Compile an exported program into an archive (.pt2); documented for users, though in a private module."""
    # Imported here alone: it takes seconds, and opening an archive does without.
    import torch._inductor

    torch._inductor.aoti_compile_and_package(program, package_path=path, inductor_configs=inductor_settings)


def load_archive(path: str, model_name: str) -> Any:
    """Load what `compile_and_package` wrote; `boxed_run(inputs)` of what is returned runs it.

    By the loader below `torch._inductor`, whose import takes 4 s (2 vCPU, 2026-11-21) and brings no more. Its other
    arguments, as torch's own wrapper gives them: not single-threaded, one runner, the device of the archive.
    """
    return torch._C._aoti.AOTIModelPackageLoader(path, model_name, False, 1, -1)
