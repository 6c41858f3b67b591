"""Settings as options: every field of a settings class is an option of the command line and a key of a
recipe."""

import json
import tomllib
from collections.abc import Callable
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import click

from lrsd.methods import METHODS
from lrsd.recipe import GROUPS
from lrsd.settings import is_repeatable

F = TypeVar("F", bound=Callable[..., Any])

_LARGEST_RECIPE = 2**20
_METHOD_HELP = "lrsd, a baseline to compare with, or losparse, which trains the model (it needs gradients)."


def settings_options(command: F) -> F:
    """Add --method, the fields of all settings, and those of all methods."""
    found = [click.option("--method", type=click.Choice(list(METHODS)), default="lrsd", show_default=True,
                          help=_METHOD_HELP)]  # fmt: skip
    for kind in GROUPS.values():
        found += [_option(field, [field]) for field in fields(kind)]
    for name, same in method_fields().items():
        found.append(_option(same[0][1], [field for _, field in same], methods=[m for m, _ in same]))
        assert name == same[0][1].name
    for option in reversed(found):
        command = option(command)
    return command


def options_of(kind: type) -> Callable[[F], F]:
    """Add the fields of one class of settings."""

    def add(command: F) -> F:
        for field in reversed(fields(kind)):
            command = _option(field, [field])(command)
        return command

    return add


def method_fields() -> dict[str, list[tuple[str, Field[Any]]]]:
    """Fields of the methods' settings by name, each with the methods that have it."""
    found: dict[str, list[tuple[str, Field[Any]]]] = {}
    for method, kind in METHODS.items():
        for field in fields(kind):
            found.setdefault(field.name, []).append((method, field))
    return found


def given_options(context: click.Context, options: dict[str, Any]) -> dict[str, Any]:
    """Those options that were typed or are in the recipe: the others have the settings' own defaults."""
    given = {}
    for name, value in options.items():
        source = context.get_parameter_source(name)
        if source is not None and source.name != "DEFAULT":
            given[name] = value
    return given


def read_recipe(context: click.Context, parameter: click.Parameter, path: Path | None) -> Path | None:
    """Make the recipe's values the defaults of the options; what is typed still wins."""
    if path is None:
        return None
    if not path.is_file() or path.stat().st_size > _LARGEST_RECIPE:
        raise click.BadParameter(f"{path} is no file of at most {_LARGEST_RECIPE:,} bytes")
    try:
        text = path.read_text(encoding="utf-8")
        recipe = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise click.BadParameter(f"{path} is neither TOML nor JSON: {error}") from error
    known = {"method", *method_fields(), *(field.name for kind in GROUPS.values() for field in fields(kind))}
    unknown = sorted(set(recipe) - known) if isinstance(recipe, dict) else ["(no table at the top)"]
    if unknown:
        raise click.BadParameter(
            f"{path}: unknown setting {unknown[0]!r}; available: {', '.join(sorted(known))}"
        )
    defaults: dict[str, Any] = {}
    settings = (field for kind in GROUPS.values() for field in fields(kind))
    repeatable = {field.name for field in settings if is_repeatable(field)}
    for name, value in recipe.items():
        if name in repeatable and value is not None:
            values = [value] if isinstance(value, str) else value  # what is given once need be no list
            if not isinstance(values, list) or not all(isinstance(item, str) for item in values):
                raise click.BadParameter(f"{path}: {name} must be a list of texts, got {value!r:.80}")
            defaults[name] = values
            continue
        if not isinstance(value, str | int | float | None):
            raise click.BadParameter(f"{path}: {name} must be a text or a number, got {value!r:.80}")
        if value is not None:
            defaults[name] = value if isinstance(value, bool) else str(value)
    context.default_map = {**(context.default_map or {}), **defaults}
    return path


def option_table() -> str:
    """Option, default and meaning of every setting: the README's table, in Markdown."""
    rows = [("--method", "lrsd", _METHOD_HELP)]
    for kind in GROUPS.values():
        rows += [(_flag(field), shown_default(field), field.metadata["help"]) for field in fields(kind)]
    for same in method_fields().values():
        field, methods = same[0][1], [method for method, _ in same]
        rows.append((_flag(field), shown_default(field), field.metadata["help"] + _of_methods(methods)))
    lines = [f"| `{flag}` | {default} | {text} |" for flag, default, text in rows]
    return "\n".join(["| option | default | meaning |", "|---|---|---|", *lines])


def shown_default(field: Field[Any]) -> str:
    """A field's default, in words."""
    if (shown := field.metadata["shown"]) is not None:
        return str(shown)
    return ("no", "yes")[field.default] if isinstance(field.default, bool) else str(field.default)


def _option(
    field: Field[Any], same: list[Field[Any]], methods: list[str] | None = None
) -> Callable[..., Any]:
    about = field.metadata
    text = about["help"] + (_of_methods(methods) if methods else "")
    more: dict[str, Any] = {
        "metavar": about["metavar"],
        "default": None,
        "help": f"{text}  [default: {shown_default(field)}]",
    }
    if about["shown"] == "required":
        del more["default"]  # None is one too, for click 8.3, and none is missing then
        more |= {"required": True, "help": text}
    if all(get_origin(f.type) is Literal for f in same):
        choices = dict.fromkeys(choice for f in same for choice in get_args(f.type))
        more["type"] = click.Choice(list(choices))
    elif field.type in (bool, bool | None):
        return click.option(f"{_flag(field)}/--no-{_flag(field)[2:]}", **{**more, "metavar": None})
    elif is_repeatable(field):
        more |= {"multiple": True, "default": ()}
    elif field.type is int:
        more["type"] = int
    return click.option(_flag(field), **more)


def _flag(field: Field[Any]) -> str:
    assert field.default is not MISSING, field.name
    return "--" + field.name.replace("_", "-")


def _of_methods(methods: list[str]) -> str:
    return f"  ({', '.join(methods)})"
