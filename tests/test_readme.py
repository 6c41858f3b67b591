"""What README.md and the help texts tell people to type, exists."""

import re
import shlex
from pathlib import Path

import click
import pytest
from lrsd_cli.main import commands
from lrsd_cli.options import option_table

CONTEXT = click.Context(commands)


def command_of(name: str) -> click.Command:
    found = commands.get_command(CONTEXT, name)
    assert found is not None, f"there is no lrsd {name}"
    return found


ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCED = "\n".join(re.findall(r"^```\w*\n(.*?)^```", README, re.DOTALL | re.MULTILINE))
# Indented lines are code blocks too; then `lrsd ...` within a sentence.
TYPED = re.findall(r"^(?: {2,4})?(lrsd [a-z].*)$", README, re.MULTILINE)
MENTIONED = re.findall(r"`(lrsd [a-z][^`]*)`", README)
EXAMPLES = [
    line.strip()
    for name in commands.list_commands(CONTEXT)
    for line in (command_of(name).epilog or "").splitlines()
    if line.startswith("  lrsd")
]


@pytest.mark.parametrize("command", ["bash scripts/demo.sh", "bash scripts/test.sh"])
def test_the_two_commands_of_the_readme_are_there(command: str) -> None:
    assert re.search(rf"^{re.escape(command)}\b", FENCED, re.MULTILINE)
    assert (ROOT / command.removeprefix("bash ")).is_file()


def test_every_file_that_the_readme_names_is_there() -> None:
    named = set(re.findall(r"\b(?:scripts|lrsd|tests)/[\w/]+\.(?:py|sh)\b", README))
    assert {name for name in named if not (ROOT / name).is_file()} == set()


@pytest.mark.parametrize("line", [*TYPED, *MENTIONED, *EXAMPLES])
def test_every_command_has_these_options_and_choices(line: str) -> None:
    words = shlex.split(re.split(r"\s\d?>|\s\|", line)[0], comments=True)[1:]
    command = command_of(words[0])
    options = {name: p for p in command.params for name in (*p.opts, *p.secondary_opts)}
    for word, following in zip(words[1:], [*words[2:], ""], strict=False):
        if not word.startswith("-") and not command.context_settings.get("allow_interspersed_args", True):
            break  # the rest is another program's
        if word.startswith("-"):
            assert word in options
            kind = options[word].type
            assert not isinstance(kind, click.Choice) or following in kind.choices


@pytest.mark.parametrize("line", [*TYPED, *EXAMPLES])
def test_every_command_is_complete(line: str) -> None:
    words = shlex.split(re.split(r"\s\d?>|\s\|", line)[0], comments=True)[1:]
    with commands.make_context("lrsd", words) as context:
        name, command, rest = commands.resolve_command(context, words)
        assert command is not None
        command.make_context(name, rest, parent=context)


def test_the_table_of_options_is_that_of_the_settings() -> None:
    """Made by `lrsd_cli.options.option_table`; print that into the README when a setting changes."""
    assert option_table() in README
