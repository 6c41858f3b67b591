"""`lrsd run`: another Python program, in which compressed checkpoints load."""

import runpy
import shutil
import signal
import sys
import traceback
from pathlib import Path

import click

_RUN_EXAMPLES = """
\b
Examples:
  lrsd run lm_eval --model hf --model_args pretrained=out --tasks hellaswag
  lrsd run my_script.py out
  lrsd run -m my_package.serve --model out
"""
# Of a program, in which its interpreter is named; exit code after Ctrl-C.
_FIRST_BYTES, _INTERRUPTED = 256, 130


@click.command(
    epilog=_RUN_EXAMPLES,
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)
@click.option("-m", "is_module", is_flag=True, help="PROGRAM is a module.")
@click.argument("program")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def run(is_module: bool, program: str, arguments: tuple[str, ...]) -> int:
    """Run a Python PROGRAM (a file, or a command of this environment) in which compressed checkpoints load.

    Needed where the program does not say `import lrsd` and torch loads no extensions
    (TORCH_DEVICE_BACKEND_AUTOLOAD=0).
    """
    path = program if is_module else _python_file(program)
    from lrsd.runtimes import transformers as _  # noqa: F401 - imported for its registration

    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    sys.argv = [path, *arguments]
    sys.path.insert(0, str(Path.cwd() if is_module else Path(path).resolve().parent))
    try:
        if is_module:
            runpy.run_module(program, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(path, run_name="__main__")
    except SystemExit as stop:
        if isinstance(stop.code, str):
            click.echo(stop.code, err=True)
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except (Exception, KeyboardInterrupt) as error:  # the program's, shown as Python itself does
        traceback.print_exc()
        return _INTERRUPTED if isinstance(error, KeyboardInterrupt) else 1
    return 0


def _python_file(program: str) -> str:
    """Raises: click.BadParameter for what is no Python program."""
    path = program if Path(program).is_file() else shutil.which(program)
    if path is None:
        raise click.BadParameter(
            f"no file and no command {program!r}; a module is run with -m", param_hint="PROGRAM"
        )
    with Path(path).open("rb") as file:
        start = file.read(_FIRST_BYTES)
    if Path(path).suffix != ".py" and not (start.startswith(b"#!") and b"python" in start):
        raise click.BadParameter(f"{path} is no Python program", param_hint="PROGRAM")
    return path
