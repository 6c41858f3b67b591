"""What can go wrong, as one clear line each.

Every error a user can cause is an `LrsdError`; the command line prints its text as one line and
exits with `exit_code`. Anything else that escapes is a bug of ours and keeps its traceback.
"""

# Exit code of what may succeed later, as sysexits.h has it (EX_TEMPFAIL): batch systems may queue it again.
TRY_AGAIN = 75


class LrsdError(Exception):
    """An expected failure. The message says what was expected, what came, and what to try."""

    exit_code = 1
    # Whether the same command will always end like this, so that what it has done is of no use.
    final = False


class InputError(LrsdError):
    """A model, text or directory given by the user cannot be used as it is."""


class LaterError(InputError):
    """The same command may succeed later: another process is at work, or the hub does not answer."""

    exit_code = TRY_AGAIN


class OthersGoneError(LrsdError):
    """Another process of this run has ended, for a reason that it says itself."""


class SettingsError(LrsdError, ValueError):
    """A setting has a value outside its range: wrong usage rather than a failed run."""

    exit_code = 2


class StorageError(LrsdError):
    """The disk does not take what is to be written: full, read-only, or failing."""


class BudgetError(LrsdError):
    """The requested ratio cannot be reached with this model and these settings."""

    final = True


class NumericsError(LrsdError):
    """A tensor holds values no solver can work with (NaN, infinity)."""

    final = True


class QualityError(LrsdError):
    """A model is further from the dense one than it may be."""


class SolverError(LrsdError):
    """A layer's problem has no finite solution, whatever the damping; the layer stays dense."""


class CheckpointError(LrsdError):
    """A compressed checkpoint is incomplete, inconsistent or of an unknown version."""
