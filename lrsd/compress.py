"""The main job: model and text in, a compressed checkpoint directory out."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext
from pathlib import Path

import torch

from lrsd.checkpoint.manifest import Manifest, holds_manifest, read_manifest
from lrsd.checkpoint.writer import publish, require_free, require_place
from lrsd.errors import InputError, LrsdError, StorageError
from lrsd.progress import Progress
from lrsd.recipe import Recipe
from lrsd.steps.embeddings import fit_embeddings
from lrsd.steps.fit import fit_blocks
from lrsd.steps.prepare import Clock, Prepared, calibration_identity, prepare
from lrsd.steps.proof import require_usable
from lrsd.steps.source import SourceModel, load_source
from lrsd.steps.write import (
    Compressed,
    environment,
    require_convertible,
    require_suits,
    write_result,
)
from lrsd.work.journal import Journal, difference, partial_directory
from lrsd.work.kept import Kept
from lrsd.work.process import Process
from lrsd.work.world import World, local_processes

# What another try may not run into: the user or the system ended the run, or there was no room for it.
_PASSING = (KeyboardInterrupt, SystemExit, StorageError, MemoryError, OSError, torch.OutOfMemoryError)
# The journal's last step; where the checkpoint is written to.
WRITTEN, _CHECKPOINT = "written", "checkpoint"


def compress(
    source: str,
    output: Path,
    recipe: Recipe,
    progress: Progress | None = None,
    *,
    resume: bool = False,
    memory: int | None = None,
    process: Process | None = None,
    world: World | None = None,
    calibration: Path | None = None,
) -> Manifest:
    """Compress the model at `source` into the new directory `output`.

    Observe the dense model on calibration text, allocate the byte budget among its layers, fit them block by
    block, and write the packed checkpoint. Finished blocks are kept beside `output` meanwhile.

    Args: resume: go on with what an earlier run of the same command has finished, if there is anything;
        the result is the same, byte by byte; memory: bytes of it allowed, all of the machine's by default;
        process: what may be changed of it, nothing by default; world: the processes that share the work,
        each of which calls this, on a file system that all of them see: one alone by default; calibration: a
        directory where what the text tells of the model is kept for runs of the same model and text.
    Raises: LrsdError; nothing is left at `output` then.
    """
    world, clock = world or World(), Clock()
    progress = progress if progress and world.leads else Progress()
    require_place(output)
    require_suits(output, recipe.run.format)
    with work_towards(output, resume, world) as journal, torch.no_grad(), ExitStack() as undone:
        journal.claim(recipe=recipe.to_dict(), environment=environment(recipe))
        finished = resume and not journal.begun and holds_manifest(output)
        if not finished and WRITTEN not in journal:
            require_free(output)
        with clock("load"):
            loaded = load_source(source, recipe, memory, process, world)
            undone.callback(loaded.residence.close)
        require_convertible(loaded, recipe.run.format)
        if finished:
            return require_same(output, loaded, recipe)
        journal.claim(model=loaded.fingerprint, text=loaded.text)
        if WRITTEN not in journal:
            kept = _kept(calibration, loaded, recipe)
            prepared = prepare(loaded, recipe, progress, clock, journal, kept)
            fitted = fit_blocks(
                prepared.replay, prepared.observation, prepared.plan, loaded.budget, recipe.method, progress,
                journal,
            )  # fmt: skip
            loaded.residence.offload()  # what is written is read on the host
            if loaded.gguf is not None:
                fitted |= fit_embeddings(
                    loaded.loaded.model, loaded.embeddings, recipe.method, prepared.plan, journal
                )
            done = Compressed(loaded, recipe, prepared.observation, prepared.plan, fitted, prepared.resources)
            if world.leads:
                written = _written(journal, output)
                write_result(done, written, clock.with_steps(journal))
                if (note := require_usable(loaded, prepared.samples, written)) is not None:
                    progress.note(note)
            journal.finish(WRITTEN)
        return move_into_place(journal, output)


def require_same(output: Path, source: SourceModel, recipe: Recipe) -> Manifest:
    """The manifest of a result that is there already. Raises: InputError if it is another command's."""
    manifest = read_manifest(output)
    found = {"model": manifest.base_fingerprint, "text": manifest.text, **manifest.recipe}
    asked = {"model": source.fingerprint, "text": source.text, **recipe.to_dict()}
    if differs := difference(found, json.loads(json.dumps(asked))):
        raise InputError(
            f"{output} holds the result of another run: {differs}; choose another output directory"
        )
    return manifest


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


def _written(journal: Journal, output: Path) -> Path:
    """Where the result is written before it is moved to `output`."""
    return journal.directory / (_CHECKPOINT + output.suffix * (output.suffix == ".gguf"))


def move_into_place(journal: Journal, output: Path) -> Manifest:
    """A written checkpoint appears under its name, and the journal goes."""
    if journal.world.leads and (written := _written(journal, output)).exists():
        publish(written, output)
    journal.world.wait()
    manifest = read_manifest(output)
    journal.remove()
    return manifest


def dry_run(
    source: str,
    recipe: Recipe,
    progress: Progress | None = None,
    *,
    memory: int | None = None,
    process: Process | None = None,
    world: World | None = None,
    calibration: Path | None = None,
) -> Prepared:
    """Observe and allocate only; nothing is left on disk. Arguments: see `compress`."""
    world = world or World()
    progress = progress if progress and world.leads else Progress()
    with (
        _scratch(world) as scratch,
        closing(Journal(scratch, world)) as journal,
        torch.no_grad(),
        ExitStack() as undone,
    ):
        clock = Clock()
        with clock("load"):
            loaded = load_source(source, recipe, memory, process, world)
            undone.callback(loaded.residence.close)
        return prepare(loaded, recipe, progress, clock, journal, _kept(calibration, loaded, recipe))


def _kept(directory: Path | None, source: SourceModel, recipe: Recipe) -> Kept | None:
    if directory is None:
        return None
    return Kept(directory, calibration_identity(source, recipe, environment(recipe)))


@contextmanager
def _scratch(world: World) -> Iterator[Path]:
    """A directory that all processes see, for as long as the context lasts."""
    # Other machines see the current directory, at best.
    place = "." if world.size > local_processes() else None
    temporary = tempfile.TemporaryDirectory(prefix="lrsd-", dir=place, ignore_cleanup_errors=world.size > 1)
    with temporary if world.leads else nullcontext("") as made:
        yield Path(world.tell(made))
        world.wait()
