"""The main job: model and text in, a compressed checkpoint directory out."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext
from importlib import import_module
from pathlib import Path
from types import ModuleType

import torch

from lrsd.checkpoint.manifest import Manifest, holds_manifest, read_manifest
from lrsd.checkpoint.writer import require_free, require_place
from lrsd.errors import InputError, SettingsError
from lrsd.model.samples import Samples
from lrsd.progress import Progress
from lrsd.recipe import Recipe
from lrsd.steps.embeddings import fit_embeddings
from lrsd.steps.fit import fit_blocks
from lrsd.steps.output import WRITTEN, move_into_place, work_towards, written_place
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
from lrsd.work.journal import Journal, difference
from lrsd.work.kept import Kept
from lrsd.work.process import Process
from lrsd.work.world import World, local_processes


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

    A method that trains does so instead (`lrsd.training`), with gradients.

    Args: resume: go on with what an earlier run of the same command has finished, if there is anything;
        the result is the same, byte by byte; memory: bytes of it allowed, all of the machine's by default;
        process: what may be changed of it, nothing by default; world: the processes that share the work,
        each of which calls this, on a file system that all of them see: one alone by default; calibration: a
        directory where what the text tells of the model is kept for runs of the same model and text.
    Raises: LrsdError; nothing is left at `output` then.
    """
    world, clock = world or World(), Clock()
    progress = progress if progress and world.leads else Progress()
    if recipe.method.trains:
        _training().method_of(recipe)
    require_place(output)
    require_suits(output, recipe.run.format)
    with work_towards(output, resume, world) as journal, torch.no_grad(), ExitStack() as undone:
        journal.claim(recipe=recipe.to_dict(), environment=environment(recipe))
        finished = resume and not journal.begun and holds_manifest(output)
        if not finished and WRITTEN not in journal:
            require_free(output)
        with clock("load"):
            load = _training().load if recipe.method.trains else load_source
            loaded = load(source, recipe, memory, process, world)
            undone.callback(loaded.residence.close)
        require_convertible(loaded, recipe.run.format)
        if finished:
            return require_same(output, loaded, recipe)
        journal.claim(model=loaded.fingerprint, text=loaded.text)
        if WRITTEN not in journal:
            if recipe.method.trains:
                done, samples = _training().train(loaded, recipe, progress, journal)
            else:
                kept = _kept(calibration, loaded, recipe)
                done, samples = _fit(loaded, recipe, progress, clock, journal, kept)
            if world.leads:
                written = written_place(journal, output)
                write_result(done, written, clock.with_steps(journal))
                if (note := require_usable(loaded, samples, written)) is not None:
                    progress.note(note)
            journal.finish(WRITTEN)
        return move_into_place(journal, output)


def _fit(
    source: SourceModel, recipe: Recipe, progress: Progress, clock: Clock, journal: Journal, kept: Kept | None
) -> tuple[Compressed, Samples]:
    """Observe, allocate, fit. Returns: what is to be written, and samples to try it on."""
    prepared = prepare(source, recipe, progress, clock, journal, kept)
    fitted = fit_blocks(
        prepared.replay, prepared.observation, prepared.plan, source.budget, recipe.method, progress, journal
    )
    source.residence.offload()  # what is written is read on the host
    if source.gguf is not None:
        fitted |= fit_embeddings(
            source.loaded.model, source.embeddings, recipe.method, prepared.plan, journal
        )
    done = Compressed(source, recipe, prepared.observation, prepared.plan, fitted, prepared.resources)
    return done, prepared.samples


def _training() -> ModuleType:
    """What trains, which is imported for methods that do only: Trainer takes seconds, and memory."""
    return import_module("lrsd.training.losparse")


def _require_dry_run(recipe: Recipe) -> None:
    """Raises: SettingsError for a method that has no plan before it has trained."""
    if recipe.method.trains:
        raise SettingsError(
            f"method {recipe.method_name} has no plan to show before it has trained; leave out --dry-run"
        )


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
    _require_dry_run(recipe)
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
