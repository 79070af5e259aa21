"""What must be the same on all hosts of a job, checked at the start, before anything is allocated.

Hosts are started with the same words, but a recipe, a data set, an installation or a folder of the same name may be
another one there. Every rank says what it has, in small messages of the process group; all come to one verdict.
"""

from __future__ import annotations

import json
import secrets
import time
import zlib
from collections.abc import Sequence
from contextlib import suppress

from papilio.data_pipeline.paths import join
from papilio.trainer.checkpoint.compatibility import DATA_KEYS, cut, shared_settings
from papilio.trainer.checkpoint.policy import RunIdentity
from papilio.trainer.config_file import ConfigError
from papilio.trainer.elastic.health.health_store import host_name
from papilio.trainer.process_group import Ranks
from papilio.trainer.storage.api import (
    StorageError,
    list_folder,
    make_folder,
    read_if_there,
    remove_file,
    write_ephemeral,
)

# What decides results, or what ranks send each other. Not Python and NumPy, whose patch levels differ harmlessly.
VERSIONS = ("papilio", "torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu")
# How long a file written on one host may take to be seen on another: NFS clients keep what a folder holds for a while,
# but look again when they list it.
SEEN_TIMEOUT_S = 20.0
POLL_S = 0.25
MAX_NAMED = 5
PROBE = ".seen-by-all-"


class HostsDifferError(ConfigError):
    """The hosts of a job were not given the same; the message says which host has what."""


def check_same_job_on_all(identity: RunIdentity, ranks: Ranks) -> None:
    """Check that all ranks have the same settings, data and packages. Collective.

    Raises:
        HostsDifferError: they have not; names the first keys that differ, with every host's value.
    """
    found = ranks.gather((host_name(), _facts(identity)))
    hosts, facts = [host for host, _ in found], [each for _, each in found]
    keys = [key for key in dict.fromkeys(key for each in facts for key in each) if len({e.get(key) for e in facts}) > 1]
    if not keys:
        return
    keys.sort(key=lambda key: (key.startswith("the data set"), not key.endswith("num_rows")))
    lines = [f"{key} = {_by_host([each.get(key, 'nothing') for each in facts], hosts)}" for key in keys[:MAX_NAMED]]
    more = f"; and {len(keys) - MAX_NAMED} more" if len(keys) > MAX_NAMED else ""
    raise HostsDifferError(
        f"the hosts of this job do not have the same: {'; '.join(lines)}{more}. Bring the same recipe, data set and "
        "packages to all hosts, and start again"
    )


def check_same_folder_on_all(key: str, folder: str, ranks: Ranks, timeout_s: float = SEEN_TIMEOUT_S) -> None:
    """Check that all ranks see what rank 0 writes in a folder, which `key` of the config names. Collective.

    Raises:
        HostsDifferError: some do not.
        StorageError: rank 0 cannot write there.
    """
    if ranks.world_size == 1:
        return
    name, problem = ranks.agree_on(_leave_probe(folder) if ranks.is_first else None)
    if problem is not None:
        raise problem
    path = join(folder, name)
    found = ranks.gather((host_name(), _look_for(path, timeout_s)))
    if ranks.is_first:
        with suppress(StorageError):
            remove_file(path)
    missing = [rank for rank, (_, why) in enumerate(found) if why]
    if missing:
        who = _named(missing, [host for host, _ in found])
        raise HostsDifferError(
            f"{folder} is not one folder on all hosts: {who} did not see what rank 0 (host {found[0][0]}) wrote there "
            f"({found[missing[0]][1]}), and would write its part of every checkpoint elsewhere. Mount the same shared "
            f"folder at this path on all hosts, or name one that all share with --{key}="
        )


def _leave_probe(folder: str) -> tuple[str, StorageError | None]:
    name = f"{PROBE}{secrets.token_hex(8)}"
    try:
        make_folder(folder)
        write_ephemeral(join(folder, name), name)
    except StorageError as error:
        return name, error
    return name, None


def _look_for(path: str, timeout_s: float) -> str:
    """Wait for a file to be seen; say why it was not."""
    folder, _, name = path.rpartition("/")
    deadline_s = time.monotonic() + timeout_s
    while True:
        try:
            list_folder(folder)  # makes an NFS client look again
            raw = read_if_there(path)
        except StorageError as error:
            return str(error)
        if raw == name.encode():
            return ""
        if time.monotonic() > deadline_s:
            return f"waited {timeout_s:g} s"
        time.sleep(POLL_S)


def _facts(identity: RunIdentity) -> dict[str, str]:
    """Return what has to be the same, by the name under which it is shown."""
    facts = shared_settings(identity.config)
    for name, split in identity.data["splits"].items():
        facts[f"the data set's {name}.num_rows"] = str(split["num_rows"])
    for key in DATA_KEYS:
        text = json.dumps(identity.data[key], sort_keys=True)
        facts[f"the data set's {key}"] = f"checksum {zlib.crc32(text.encode()):08x}"
    return facts | {f"version of {name}": identity.versions.get(name, "none") for name in VERSIONS}


def _by_host(values: Sequence[str], hosts: Sequence[str]) -> str:
    """Say which ranks have which value, as in `0.1 on host a (rank 0), 0.2 on host b (ranks 1, 2)`."""
    ranks_by_value: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        ranks_by_value.setdefault(value, []).append(rank)
    return ", ".join(f"{cut(value)} on {_named(ranks, hosts)}" for value, ranks in ranks_by_value.items())


def _named(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    """Name ranks by host."""
    ranks_by_host: dict[str, list[int]] = {}
    for rank in ranks:
        ranks_by_host.setdefault(hosts[rank], []).append(rank)
    words = [
        f"host {host} ({'rank' if len(there) == 1 else 'ranks'} {cut(', '.join(map(str, there)))})"
        for host, there in ranks_by_host.items()
    ]
    return ", ".join(words[:MAX_NAMED]) + (f" and {len(words) - MAX_NAMED} more" if len(words) > MAX_NAMED else "")
