"""Private names of torch's elastic agent and rendezvous, most of them hooks that trainer/elastic overrides.

Torch documents `LocalElasticAgent` as a class to extend, but its hooks are underscored; and it has no public way to
keep the hosts together while the store does not answer. An override whose name torch no longer calls would be silent:
the contract test is the only guard. The reasons are told in trainer/elastic/{agent,rendezvous,store}.py.
"""

from __future__ import annotations

from torch.distributed.elastic.rendezvous.dynamic_rendezvous import (
    _BackendRendezvousStateHolder as BackendRendezvousStateHolder,
)

from papilio.sharding.compat.private_name import PrivateName

__all__ = ["NEEDED", "BackendRendezvousStateHolder"]

_AGENT = "torch.distributed.elastic.agent.server.local_elastic_agent.LocalElasticAgent"
_RENDEZVOUS = "torch.distributed.elastic.rendezvous.dynamic_rendezvous"
_HANDLER = f"{_RENDEZVOUS}.DynamicRendezvousHandler"
_HOLDER = f"{_RENDEZVOUS}._BackendRendezvousStateHolder"
_BACKEND = "torch.distributed.elastic.rendezvous.c10d_rendezvous_backend.C10dRendezvousBackend"
_OF_GROUP = ("self", "worker_group")
_RETURNS = "to let a host that was cut off take its place again"
NEEDED = (
    # Overridden by Agent (trainer/elastic/agent.py).
    PrivateName(_AGENT, "_start_workers", "to tell the ranks where the health store is", _OF_GROUP),
    PrivateName(_AGENT, "_monitor_workers", "to see which rank failed first and which have saved", _OF_GROUP),
    PrivateName(_AGENT, "_stop_workers", "to let ranks save before a restart", _OF_GROUP),
    PrivateName(_AGENT, "_shutdown", "to let ranks save at the end", ("self", "death_sig")),
    # Called or assigned by it.
    PrivateName(_AGENT, "_restart_workers", "to resume after all ranks have saved", _OF_GROUP),
    PrivateName(_AGENT, "_exit_barrier", "to let all hosts see why the job ends", ("self",)),
    PrivateName(_AGENT, "_exit_barrier_timeout", "to bound how long it waits at the end", is_assigned=True),
    PrivateName(_AGENT, "_remaining_restarts", "to forbid restarts, or to count them anew", is_assigned=True),
    PrivateName(_AGENT, "_worker_group", "to know the ranks of this host", is_assigned=True),
    PrivateName(_AGENT, "_pcontext", "to end ranks and see their exit statuses", is_assigned=True),
    PrivateName(
        "torch.distributed.elastic.multiprocessing.api.SubprocessContext",
        "subprocess_handlers",
        "to see the exit statuses of ranks",
        is_assigned=True,
    ),
    PrivateName(
        "torch.distributed.elastic.multiprocessing.api.PContext",
        "stderrs",
        "to quote the last error of a rank",
        is_assigned=True,
    ),
    # Overridden by _State (trainer/elastic/rendezvous.py), and what it reads.
    PrivateName(_HOLDER, "__init__", "to hold the state of the rendezvous", ("self", "backend", "settings")),
    PrivateName(_HOLDER, "_sanitize", "to be lenient after an outage of the store", ("self",)),
    PrivateName(_HOLDER, "_backend", "to be lenient after an outage of the store", is_assigned=True),
    PrivateName(_HOLDER, "_settings", "to be lenient after an outage of the store", is_assigned=True),
    PrivateName(_HOLDER, "sync", _RETURNS, ("self",)),
    PrivateName(_HOLDER, "mark_dirty", _RETURNS, ("self",)),
    # Read or assigned by Rendezvous (trainer/elastic/rendezvous.py).
    PrivateName(
        _HANDLER,
        "__init__",
        "to meet at a store of its own",
        ("self", "node", "settings", "backend_name", "store", "state_holder"),
    ),
    PrivateName(_HANDLER, "_node_desc_generator", "to name this host"),
    PrivateName(_HANDLER, "_state_holder", "to know which hosts are there", is_assigned=True),
    PrivateName(_HANDLER, "_heartbeat_lock", "to read the state beside the heartbeat thread", is_assigned=True),
    PrivateName(_HANDLER, "_this_node", _RETURNS, is_assigned=True),
    PrivateName(_HANDLER, "_store", "to replace a connection that was lost", is_assigned=True),
    *(
        PrivateName(f"{_RENDEZVOUS}._RendezvousState", name, _RETURNS, is_assigned=True)
        for name in ("round", "complete", "participants", "wait_list", "last_heartbeats")
    ),
    # Overridden by Backend (trainer/elastic/store.py), and what it reads.
    PrivateName(_BACKEND, "_call_store", "to replace a connection that was lost", ("self", "store_op")),
    PrivateName(_BACKEND, "_key", "to find the state in the store", is_assigned=True),
    PrivateName(_BACKEND, "_NULL_SENTINEL", "to see whether the store was started anew"),
    # Public by name, documented nowhere.
    PrivateName(
        "torch.distributed.elastic.rendezvous.utils",
        "parse_rendezvous_endpoint",
        "to read --rdzv-endpoint",
        ("endpoint", "default_port"),
    ),
    PrivateName("torch.distributed.run", "parse_args", "to take torchrun's options", ("args",)),
    PrivateName("torch.distributed.run", "config_from_args", "to take torchrun's options", ("args",)),
)
