"""What can go wrong that is not a bug, each with the exit status that the command line gives it."""

from __future__ import annotations


class IntaglioError(Exception):
    """A problem that a user can act on: one line that names what, where, expected and remedy."""

    exit_status = 1


class InputError(IntaglioError):
    """Bad usage or bad input: a missing or corrupt file, a wrong shape or type, an option that makes no sense."""

    exit_status = 2


class InfeasibleError(IntaglioError):
    """No plan meets the budgets; the message names the nearest feasible ones."""

    exit_status = 3


class VerificationError(IntaglioError):
    """The compressed model does not keep its promise on held-out data."""

    exit_status = 4


class LateError(VerificationError):
    """It keeps all but its latency budget.

    Attributes:
        excess: its latency over the budget's, above 1.
    """

    def __init__(self, message: str, excess: float) -> None:
        super().__init__(message)
        self.excess = excess
