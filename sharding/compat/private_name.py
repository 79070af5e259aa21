"""How `compat` modules declare a private name that they need; tests/test_private_apis.py holds it to that."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PrivateName:
    """A name that a library may rename without notice.

    Attributes:
        owner: the module or class that has it, in full.
        name: the name there.
        purpose: what would break without it, to follow "needs it ".
        parameters: those that we pass, or that our override takes, in this order and before all others; None: it is no
            function, or has no signature that Python can read.
        is_assigned: instances have it, since methods of the owner assign it; the class has not.
        since: the first release that has it; older ones do without.
    """

    owner: str
    name: str
    purpose: str
    parameters: tuple[str, ...] | None = None
    is_assigned: bool = False
    since: str | None = None

    @property
    def depends_on(self) -> str:
        """The package on which it depends."""
        return self.owner.partition(".")[0]
