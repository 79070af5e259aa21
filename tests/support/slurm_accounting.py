"""Slurm's accounting database for a cluster of tests: slurmdbd on a MariaDB of its own, without root."""

from __future__ import annotations

import getpass
import subprocess
from collections.abc import Callable
from pathlib import Path

from tests.support.slurm_programs import SlurmPrograms

StartDaemon = Callable[[str, list[str], dict[str, str]], None]

CONFIG = """
DbdHost=localhost
DbdPort={port}
SlurmUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
PidFile={folder}/slurmdbd.pid
LogFile={folder}/log/slurmdbd.log
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm_acct
"""
# For slurm.conf: without a pass slurmctld looks for munge's socket where the system has it.
CLUSTER_CONFIG = """
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=localhost
AccountingStoragePort={port}
AccountingStoragePass={folder}/munge/socket
"""
# What slurmdbd advises, and nothing for durability.
DATABASE_OPTIONS = (
    "--skip-networking",
    "--innodb-buffer-pool-size=64M",
    "--innodb-lock-wait-timeout=900",
    "--innodb-flush-log-at-trx-commit=0",
    "--innodb-flush-method=nosync",
    "--skip-log-bin",
)


def database_socket(folder: Path) -> Path:
    """Where MariaDB listens once it is up."""
    return folder / "database.socket"


def start_database(programs: SlurmPrograms, folder: Path, start_daemon: StartDaemon) -> None:
    """Make an empty database and start its server."""
    base = [f"--basedir={programs.root}/usr"] if programs.root else []
    data, user = folder / "database", getpass.getuser()
    command = ["mariadb-install-db", "--no-defaults", *base, f"--user={user}", f"--datadir={data}", "--skip-test-db"]
    command.append("--auth-root-authentication-method=normal")
    subprocess.run(command, env=programs.environment(), capture_output=True, timeout=60, check=True)
    options = [f"--user={user}", f"--datadir={data}", f"--socket={database_socket(folder)}", *DATABASE_OPTIONS]
    start_daemon("mariadbd", ["mariadbd", "--no-defaults", *base, *options], {})


def start_slurmdbd(programs: SlurmPrograms, folder: Path, port: int, start_daemon: StartDaemon) -> None:
    """Start slurmdbd; slurmctld waits for it."""
    config = CONFIG.format(port=port, folder=folder, user=getpass.getuser())
    config += f"PluginDir={programs.plugins}\n" if programs.plugins else ""
    path = folder / "slurmdbd.conf"
    path.touch(mode=0o600)
    path.write_text(config)
    # It has no setting for the socket; libmariadb takes this one.
    start_daemon("slurmdbd", ["slurmdbd", "-D"], {"MYSQL_UNIX_PORT": str(database_socket(folder))})
