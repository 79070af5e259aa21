"""What a Kubernetes cluster, or its absence, answers, in one line that names the fix."""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from papilio.launch.schedulers.errors import SchedulerError

UNAUTHORIZED, FORBIDDEN, NOT_FOUND = 401, 403, 404


def require_client() -> None:
    """Check that the Kubernetes client is installed; TorchX would end with a traceback.

    Raises:
        SchedulerError: it is not.
    """
    if importlib.util.find_spec("kubernetes") is None:
        raise SchedulerError(
            "the Kubernetes client is not installed here: pip install 'kubernetes>=31,<37' (or papilio[kubernetes])"
        )


@contextmanager
def explained(host: str) -> Iterator[None]:
    """Turn the client's errors, while it talks to the cluster at `host`, into ours.

    Raises:
        SchedulerError: the cluster does not answer, or refuses.
    """
    from kubernetes.client.exceptions import ApiException
    from urllib3.exceptions import HTTPError

    # It would tell of each vain attempt.
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
    try:
        yield
    except ApiException as error:
        raise SchedulerError(f"the Kubernetes cluster at {host} {_refusal(error)}") from None
    except HTTPError as error:
        cause = str(getattr(error, "reason", None) or error).rpartition(": ")[2]
        raise SchedulerError(
            f"the Kubernetes cluster at {host} does not answer: {cause}; does `kubectl cluster-info` work here? "
            "KUBECONFIG and its context choose the cluster"
        ) from None


def _refusal(error: object) -> str:
    status, reason = getattr(error, "status", None), getattr(error, "reason", "")
    # What is no cluster may answer with something else.
    with suppress(ValueError, AttributeError):
        reason = json.loads(getattr(error, "body", "") or "{}").get("message") or reason
    if status == UNAUTHORIZED:
        return f"does not know you ({reason}): log in again, so that `kubectl get pods` works"
    if status == FORBIDDEN:
        return f"forbids it ({reason}): ask for a role that may use jobs.batch.volcano.sh and pods in this namespace"
    if status == NOT_FOUND:
        return (
            f"knows no Volcano jobs in this namespace ({reason}): install Volcano (https://volcano.sh), or name "
            "another namespace with -cfg namespace=NAME"
        )
    return f"answered {status}: {reason}"
