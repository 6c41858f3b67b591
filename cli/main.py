"""`lrsd`: the entry point. What lrsd itself needs is imported only when a command runs."""

import os
import signal
import sys
from importlib import import_module
from types import FrameType

import click

# Module, function and help of every command. They are imported when they are asked for: `lrsd --help` answers
# at once.
_COMMANDS = {
    "compress": ("compress", "compress", "Compress a model into a new checkpoint directory."),
    "recover": ("recover", "recover", "Distill a dense model into what was compressed from it."),
    "eval": ("measure", "evaluate", "Measure a model: perplexity, divergence from the dense one, speed."),
    "inspect": ("measure", "inspect", "Show every layer of a compressed directory."),
    "report": ("report", "report", "Draw one HTML page of what was done, with pictures."),
    "verify": ("measure", "verify", "Compare every file of a compressed directory with its digest."),
    "export": ("export", "export", "Write a compressed directory in a format that other programs read."),
    "push": ("push", "push", "Upload a compressed directory to a model hub."),
    "run": ("run", "run", "Run another Python program, in which compressed checkpoints load."),
}


# Exit codes by signal; of SIGUSR1, by which batch systems warn of limits, that of what may succeed later.
_STOPPING: dict[int, int] = {signal.SIGTERM: 128 + signal.SIGTERM, signal.SIGUSR1: 75}


class LazyGroup(click.Group):
    """Commands that are listed without being imported."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in _COMMANDS:
            return None
        module, function, _ = _COMMANDS[name]
        command: click.Command = getattr(import_module(f"lrsd_cli.{module}"), function)
        return command

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, _, text) in _COMMANDS.items()])


def main() -> None:
    """Entry point. Every expected failure ends as one line on stderr and an exit code."""
    if _is_one_of_many():
        # Without the C++ stack traces that torch logs for every process that has ended.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    for number in _STOPPING:
        signal.signal(number, _terminated)
    try:
        code = commands.main(prog_name="lrsd", standalone_mode=False)
    except click.exceptions.Abort as abort:
        click.echo(f"interrupted; {_kept(abort.__cause__ or abort)}", err=True)
        code = 130
    except click.ClickException as error:
        code = _wrong_usage(error)
    except SystemExit as stop:
        click.echo(f"terminated; {_kept(stop)}", err=True)
        code = stop.code
    except BrokenPipeError:
        sys.stderr.close()
        code = 0
    except Exception as error:
        code = _report(error)
    sys.exit(code)


def _wrong_usage(error: click.ClickException) -> int:
    context = error.ctx if isinstance(error, click.UsageError) else None
    if context is None or error.message == context.get_help():  # a bare `lrsd` is answered by the help
        error.show()
    else:
        message = error.format_message().rstrip(".")
        click.echo(f"lrsd: {message}; see {context.command_path} --help", err=True)
    return error.exit_code


def _kept(stopped: BaseException) -> str:
    """What is left of a run that was stopped, and how to go on."""
    return "; ".join(getattr(stopped, "__notes__", ["nothing was written"]))


def _report(error: Exception) -> int:
    from lrsd.errors import LrsdError

    notes = "".join(f"; {note}" for note in getattr(error, "__notes__", []))
    if isinstance(error, LrsdError):
        click.echo(f"{_who()}: {error}{notes}", err=True)
        return error.exit_code
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        line = str(error).strip().splitlines()[0]
        click.echo(f"lrsd: {line} Lower --batch, or take a CPU with --device cpu{notes}", err=True)
        return 1
    if isinstance(error, OSError) and error.errno is not None:
        click.echo(f"{_who()}: {error.strerror}: {error.filename or 'no file named'}{notes}", err=True)
        return 1
    raise error


def _who() -> str:
    """The program, and which of several processes."""
    return "lrsd" + f" (process {os.environ.get('RANK')})" * _is_one_of_many()


def _is_one_of_many() -> bool:
    return os.environ.get("WORLD_SIZE", "1") != "1"


def _terminated(number: int, frame: FrameType | None) -> None:
    """Says nothing itself: the signal may have come in the middle of a line to stderr, and Python's
    streams refuse a second writer."""
    raise SystemExit(_STOPPING[number])


@click.command(
    cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(package_name="lrsd")
def commands() -> None:
    """Compress language models without training (but for --method losparse): low rank + column-structured
    sparse + quantized."""


if __name__ == "__main__":
    main()
