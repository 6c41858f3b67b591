"""The way to an output: the journal beside it, and the move into its place."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from lrsd.checkpoint.manifest import Manifest, read_manifest
from lrsd.checkpoint.writer import publish
from lrsd.errors import InputError, LrsdError, StorageError
from lrsd.work.journal import Journal, partial_directory
from lrsd.work.world import World

# What another try may not run into: the user or the system ended the run, or there was no room for it.
_PASSING = (KeyboardInterrupt, SystemExit, StorageError, MemoryError, OSError, torch.OutOfMemoryError)
# The journal's last step; where the checkpoint is written to.
WRITTEN, _CHECKPOINT = "written", "checkpoint"


@contextmanager
def work_towards(output: Path, resume: bool, world: World) -> Iterator[Journal]:
    """The journal beside `output`. What it holds outlives an interruption and a full disk, but not an error
    that another try would run into again.

    Raises: InputError if there is unfinished work and it is not to be resumed.
    """
    journal = Journal(partial_directory(output), world)
    if journal.begun and not resume and not journal.finished_steps:
        journal.remove()  # stopped before anything was finished
        journal = Journal(journal.directory, world)
    if journal.begun and not resume:
        journal.close()
        raise InputError(
            f"{journal.directory} holds the unfinished work of an earlier run; add --resume to go on with "
            "it, or delete it"
        )
    try:
        yield journal
    except BaseException as error:
        if journal.begun and world.leads:
            if (isinstance(error, LrsdError) and error.final) or not journal.worth_keeping:
                journal.remove()
            elif isinstance(error, _PASSING):
                error.add_note(
                    f"finished work is kept in {journal.directory}; the same command with --resume goes on"
                )
            elif not isinstance(error, LrsdError):  # which says itself what to do
                error.add_note(
                    "the same command would end like this again; finished work is kept in "
                    f"{journal.directory}, for a release of lrsd that can go on with it"
                )
        raise
    finally:
        journal.close()


def written_place(journal: Journal, output: Path) -> Path:
    """Where the result is written before it is moved to `output`."""
    return journal.directory / (_CHECKPOINT + output.suffix * (output.suffix == ".gguf"))


def move_into_place(journal: Journal, output: Path) -> Manifest:
    """A written checkpoint appears under its name, and the journal goes."""
    if journal.world.leads and (written := written_place(journal, output)).exists():
        publish(written, output)
    journal.world.wait()
    manifest = read_manifest(output)
    journal.remove()
    return manifest
