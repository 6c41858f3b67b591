"""Finished steps that are kept in memory only."""

from lrsd.work.journal import Workspace


def test_in_memory_too_a_step_that_was_put_is_not_lost_by_finishing_it() -> None:
    """As a journal has it on disk."""
    workspace = Workspace()
    workspace.put("observe-0", "found")
    workspace.finish("observe-0")
    assert workspace.read("observe-0", str) == "found"
    workspace.finish("fit-0", "solved")
    assert workspace.read("fit-0", str) == "solved"
