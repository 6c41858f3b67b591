"""`lrsd push`: parse, call one function of lrsd, print."""

from pathlib import Path

import click

_EXAMPLES = """
\b
Examples:
  lrsd push out me/smol-4x
  lrsd push out me/smol-4x --public
"""


@click.command(epilog=_EXAMPLES)
@click.argument("directory", type=click.Path(path_type=Path))
@click.argument("repository", metavar="OWNER/NAME")
@click.option("--public", is_flag=True, help="Make a new repository that all can see; else a private one.")
def push(directory: Path, repository: str, public: bool) -> None:
    """Upload a compressed DIRECTORY to a model hub, with the token that `hf auth login` keeps. Nothing else
    in lrsd ever uploads anything."""
    from lrsd.checkpoint.push import push as run

    click.echo(f"pushed to {run(directory, repository, public=public)}")
