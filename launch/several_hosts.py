"""Training on several hosts without a scheduler: the same command on each of them, which meet at one endpoint."""

from __future__ import annotations

import argparse
import os
import socket
import sys
from collections.abc import Sequence

from torchx import specs

from papilio.launch import roles
from papilio.launch.components import GRACE_S
from papilio.launch.host_request import request_host
from papilio.launch.preflight.reach import gloo_address, interface_of
from papilio.launch.usage import UsageError
from papilio.trainer.elastic.addresses import addresses_of, is_loopback, own_address_towards
from papilio.trainer.elastic.bootstrap import module_command

# Torch's store looks up the name of whoever connects, while all others wait: a name server that is silent may cost 1 s,
# not 10. And it prints a stack of C++ for each client that sends what it does not know.
STORE_ENVIRONMENT = {"RES_OPTIONS": "timeout:1 attempts:1", "TORCH_CPP_LOG_LEVEL": "ERROR"}


def meeting_of(namespace: argparse.Namespace, run_dir: str | None) -> roles.Meeting | None:
    """Return where the hosts meet, None for a job of this host alone; `run_dir` is the config's.

    Raises:
        UsageError: the hosts would not meet there, or could not talk to each other.
    """
    _, most = roles.bounds(namespace.nnodes)
    endpoint = namespace.rdzv_endpoint
    if most == 1:
        if endpoint is not None:
            raise UsageError(f"--rdzv-endpoint {endpoint}: say with --nnodes how many hosts meet there")
        return None
    if endpoint is None:
        raise UsageError(
            f"--nnodes {namespace.nnodes} without a scheduler needs --rdzv-endpoint HOST:PORT, where the hosts meet: "
            "run this same command on each host, with the first one's name and a port free there, as --rdzv-endpoint "
            f"{socket.gethostname()}:29400. On a scheduler: papilio launch -s slurm train ..."
        )
    if namespace.wait_s < 1:
        raise UsageError(f"--wait-s {namespace.wait_s}: hosts wait for each other at least 1 s")
    if run_dir is None:
        raise UsageError(
            f"--nnodes {namespace.nnodes} without a scheduler needs --output.run_dir=DIR, a folder that all hosts see: "
            "hosts that come again go on with the run there"
        )
    host, port = _host_and_port(endpoint)
    _check_leads_to_one_host(endpoint, host)
    _check_own_name(host, port)
    return roles.Meeting(endpoint, namespace.rdzv_id, namespace.wait_s)


def one_host_of(command: Sequence[str], nproc: int) -> specs.AppDef:
    """Return this host's part of a training job, whose agent `command` starts."""
    around = roles.ExecutionEnvironment(None, None, None, None, omp_threads=1, max_retries=0)
    return roles.make_app("train", "train", command, request_host(None, nproc=nproc), around, grace_s=GRACE_S)


def run_rendezvous(namespace: argparse.Namespace) -> int:
    """Become the process that holds the store; it ends by a signal."""
    if not 0 <= namespace.port < 1 << 16:
        raise UsageError(f"--port {namespace.port}: a port is 1 to 65535, or 0 for any that is free")
    sys.stdout.flush()
    command = module_command("papilio.trainer.elastic.store_server", "--port", str(namespace.port))
    os.execve(sys.executable, command, {**STORE_ENVIRONMENT, **os.environ})


def _host_and_port(endpoint: str) -> tuple[str, int]:
    host, _, port = endpoint.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isdigit() or not 0 < int(port) < 1 << 16:
        raise UsageError(f"--rdzv-endpoint {endpoint}: write HOST:PORT, as n1:29400 or [fd00::1]:29400")
    return host, int(port)


def _check_leads_to_one_host(endpoint: str, host: str) -> None:
    """Check that the name leads to the same host from everywhere, and not every host to itself."""
    addresses = addresses_of(host)
    if not addresses:
        raise UsageError(
            f"--rdzv-endpoint {endpoint}: {host} does not resolve here; add it to /etc/hosts, or give its address"
        )
    loopback = next(filter(is_loopback, addresses), None)
    if loopback is not None:
        what = host if host == loopback else f"{host} resolves to {loopback} here, which"
        raise UsageError(
            f"--rdzv-endpoint {endpoint}: {what} leads every host to itself, so each would meet nobody; give the "
            "address at which other hosts reach that host (`ip -br addr` there lists its addresses)"
        )


def _check_own_name(host: str, port: int) -> None:
    """Check that gloo, which goes by this host's own name, will not tell the others a loopback address."""
    name = socket.gethostname()
    address = gloo_address(name)
    if not is_loopback(address):
        return
    own = own_address_towards(host, port) or ""
    interface = interface_of(own) or "INTERFACE"
    raise UsageError(
        f"this host's own name, {name}, leads to {address}, and gloo would tell the other hosts to find it there: "
        f"export GLOO_SOCKET_IFNAME={interface}, or let {name} resolve to {own or 'its address'} in /etc/hosts"
    )
