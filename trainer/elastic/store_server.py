"""Hold the store of a rendezvous until a signal comes: `python -m papilio.trainer.elastic.store_server --port P`."""

from __future__ import annotations

import argparse
import signal
import socket
import sys
from collections.abc import Sequence

from torch.distributed.elastic.rendezvous import RendezvousConnectionError

from papilio.trainer.elastic.exit_codes import exit_now
from papilio.trainer.elastic.store import store_server

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def main(arguments: Sequence[str] | None = None) -> int:
    """Hold it; 0 after a signal, 1 if the port is taken."""
    parser = argparse.ArgumentParser(
        prog="papilio.trainer.elastic.store_server", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("--port", type=int, required=True)
    port = parser.parse_args(arguments).port
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # before the store's threads start, which inherit it
    try:
        store = store_server("localhost", port)
    except RendezvousConnectionError as error:
        print(f"papilio rendezvous: error: {error}; take another one with --port", file=sys.stderr, flush=True)
        return 1
    assert store is not None
    endpoint = f"{socket.gethostname()}:{store.port}"
    print(
        f"the store is at {endpoint}; on each host of a job: papilio train ... --rdzv-endpoint {endpoint}", flush=True
    )
    number = signal.sigwait(SIGNALS)
    print(f"papilio rendezvous: ended by {signal.Signals(number).name}; jobs that meet here lose it", file=sys.stderr)
    return 0


if __name__ == "__main__":
    exit_now(main())
