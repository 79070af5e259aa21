"""`papilio serve`: one process that serves, or one that starts several and keeps them alive. The latter needs no torch.

python -m papilio.trainer.inference.serving.main '{"package": "pkg/", "port": 8000}'
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence

from papilio.trainer.inference.package.format import PackageError, read_package
from papilio.trainer.inference.serving.metrics import Metrics, make_shared_cells
from papilio.trainer.inference.serving.serve_options import OTHER_PORT, PASSIVE_WAITS, ServeError, ServeOptions
from papilio.trainer.inference.serving.worker_group import Worker, run_workers

INSTALL_HINT = 'the server is not installed: pip install "papilio[serve]"'


def main(arguments: Sequence[str]) -> int:
    """Serve as the JSON of a `ServeOptions` says; with a second argument, as a worker of a group. Return the status."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    logging.getLogger("papilio.trainer").setLevel(logging.INFO)
    # Until there is something to swap it means nothing; by default it would end the process.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})
    for name, value in PASSIVE_WAITS.items():
        os.environ.setdefault(name, value)
    options = ServeOptions.model_validate_json(arguments[0])
    try:
        if len(arguments) > 1:
            return _run_worker(options, Worker.from_argument(arguments[1]))
        return _run(options)
    except (ServeError, PackageError) as error:
        print(f"papilio serve: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # while the package is loaded; later, the server takes it
        return 128 + signal.SIGINT


def _run(options: ServeOptions) -> int:
    read_package(options.package)
    _require_installed()
    listener = bind(options.host, options.port)
    if options.workers == 1:
        from papilio.trainer.inference.serving.server import serve

        return serve(options, listener, Metrics())
    return run_workers(options, listener, make_shared_cells(options.workers))


def _run_worker(options: ServeOptions, worker: Worker) -> int:
    from papilio.trainer.inference.serving.server import serve

    listener = socket.socket(fileno=worker.listener)
    return serve(options, listener, Metrics(worker.cells, worker.number), worker.parent)


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that has the port but does not listen yet.

    Raises:
        ServeError: the port is taken, or the address is not of this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, ValueError) as error:  # ValueError: a host that no name can be, as one with a label of 70 letters
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise ServeError(f"cannot listen on {host} port {port}: {reason}; {OTHER_PORT}") from None
    return listener


def _require_installed() -> None:
    try:
        import uvicorn  # noqa: F401
    except ImportError:
        raise ServeError(INSTALL_HINT) from None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
