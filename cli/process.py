"""The process that a command runs in, which is its own: the one place where lrsd changes more than its
modules."""

from contextlib import AbstractContextManager

from lrsd.work.process import Process


def own_process() -> AbstractContextManager[Process]:
    """Also registers the loader of compressed checkpoints, which `import lrsd` leaves to the command line."""
    import lrsd.runtimes.transformers  # noqa: F401 - imported for its registration
    from lrsd.model.load import gguf_parsed_once, without_bars
    from lrsd.work import process

    return process.own_process(gguf_parsed_once(), without_bars())
