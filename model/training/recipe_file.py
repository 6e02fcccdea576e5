"""Recipes as files: TOML, or a Python file with `build(num_classes)`; and `--set key=value` on top of
them."""

import ast
import dataclasses
import difflib
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from dsg.model.network.config import FIELD_NAMES
from dsg.model.training.config import Recipe

_SHIPPED = Path(__file__).parent / "recipes"
_WANTED = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", dict: "a table"}
_NOT_OVERRIDDEN = ("num_classes", "max_detections")  # the data and predict.max_detections say these


def recipes() -> list[str]:
    """Names of the recipes that ship."""
    return sorted(path.stem for path in _SHIPPED.glob("*.toml"))


def load_recipe(name_or_path: str | Path, settings: Sequence[str] = ()) -> Recipe:
    """Reads a recipe and applies `--set` settings to it.

    Args:
        name_or_path: a shipped recipe's name; a path of a TOML file; or a path of a Python file that defines
            ``build(num_classes) -> nn.Module`` and, if it likes, ``recipe = "NAME_OR_FILE.toml"`` for all
            the rest (default "fast"). The file is not run here, only when the network is built.
        settings: ``"section.key=value"`` each, value as in TOML; a text needs no quotes.

    Raises:
        ValueError: no such recipe, an unknown key, a value of the wrong type, or values that contradict each
            other; one line that names the file or the setting, and near names.
    """
    path, build_file = _find(str(name_or_path)), None
    if path.suffix == ".py":
        build_file, path = path.resolve(), _find(_recipe_of_python(path), beside=path.parent)
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise ValueError(f"recipe {path}: not readable as TOML: {error}") from None
    for setting in settings:
        _apply(table, setting)
    try:
        recipe = from_table(Recipe, {"name": path.stem, **table})
    except ValueError as error:
        source = "--set" if _is_valid(path, settings) else f"recipe {path.name}"
        raise ValueError(f"{source}: {error}") from None
    if build_file:
        recipe = dataclasses.replace(recipe, name=build_file.stem, build_file=build_file)
    return recipe


def from_table(cls: type, table: Mapping[str, Any], where: str = "") -> Any:
    """A config dataclass from a TOML table, all types checked.

    Args:
        cls: the dataclass; its fields may be dataclasses.
        table: keys and values as TOML gives them.
        where: dotted place of the table, for messages.

    Raises:
        ValueError: an unknown key (near names are listed), a wrong type, or what `cls` itself refuses.
    """
    hints = typing.get_type_hints(cls)
    fields = {f.name: hints[f.name] for f in dataclasses.fields(cls)}
    values = {}
    for key, value in table.items():
        if key not in fields or key == "build_file":
            raise ValueError(_unknown(f"{where}{key}", where))
        values[key] = _typed(fields[key], value, f"{where}{key}")
    return cls(**values)


def to_table(config: Any) -> dict[str, Any]:
    """A config dataclass as plain tables, for a checkpoint: paths as text, tuples as lists."""
    return _plain(dataclasses.asdict(config))


def keys(cls: type = Recipe, where: str = "") -> list[str]:
    """All dotted keys that a recipe file or `--set` may give."""
    hints = typing.get_type_hints(cls)
    names = []
    for f in dataclasses.fields(cls):
        kind = hints[f.name]
        if dataclasses.is_dataclass(kind):
            names += keys(typing.cast(type, kind), f"{where}{f.name}.")
        elif f.name == "overrides":
            names += [f"overrides.{name}" for name in FIELD_NAMES if name not in _NOT_OVERRIDDEN]
        elif f.name != "build_file":
            names.append(where + f.name)
    return names


def _find(name: str, beside: Path | None = None) -> Path:
    shipped = _SHIPPED / f"{name}.toml"
    if name in recipes():
        return shipped
    path = Path(name)
    if beside is not None and not path.is_absolute():
        path = beside / path
    if path.suffix not in (".toml", ".py"):
        raise ValueError(f"no recipe {name!r}:{_near(name, recipes())} recipes are {', '.join(recipes())}, or a file")
    if not path.is_file():
        raise ValueError(f"no recipe file {path}: give a TOML or Python file, or one of {', '.join(recipes())}")
    return path


def _recipe_of_python(path: Path) -> str:
    """The text that a Python config assigns to `recipe`, read without running the file."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError) as error:
        raise ValueError(f"config {path}: not readable as Python: {error}") from None
    if not any(isinstance(node, ast.FunctionDef) and node.name == "build" for node in tree.body):
        raise ValueError(f"config {path}: defines no function build(num_classes)")
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "recipe" for t in node.targets):
            if not (isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)):
                raise ValueError(f"config {path}: recipe must be a text, the name or file of a TOML recipe")
            return node.value.value
    return "fast"


def _apply(table: dict[str, Any], setting: str) -> None:
    """Puts one ``key=value`` into `table`, in place."""
    key, equals, text = setting.partition("=")
    key = key.strip()
    if not equals or not key:
        raise ValueError(f"--set {setting}: write key=value, such as optimizer.lr=0.01")
    *sections, leaf = key.split(".")
    if key not in keys():
        raise ValueError(f"--set {setting}: {_unknown(key, '.'.join([*sections, '']) if sections else '')}")
    for section in sections:
        table = table.setdefault(section, {})
    table[leaf] = _value(text.strip())


def _value(text: str) -> Any:
    """A value as TOML writes it; anything else is taken as text."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _is_valid(path: Path, settings: Sequence[str]) -> bool:
    """Whether the recipe is sound without `settings`, so that they are what is wrong."""
    if not settings:
        return False
    try:
        load_recipe(path)
    except ValueError:
        return False
    return True


def _typed(kind: Any, value: Any, where: str) -> Any:
    """`value` as type `kind`; ValueError with what came and what was wanted."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        if isinstance(value, Mapping):
            return from_table(typing.cast(type, kind), value, f"{where}.")
        first = keys(typing.cast(type, kind), f"{where}.")[0]
        raise ValueError(f"{where} is {value!r}; it is a section: set its keys, such as {first}")
    if origin is Literal:
        if value in arguments:
            return value
        raise ValueError(f"{where} is {value!r};{_near(value, arguments)} choose {' or '.join(map(str, arguments))}")
    if origin in (typing.Union, types.UnionType):
        for choice in arguments:
            if choice is not type(None):
                try:
                    return _typed(choice, value, where)
                except ValueError as error:
                    failed = error
        raise failed
    if origin is tuple and isinstance(value, list | tuple):
        kinds = [arguments[0]] * len(value) if arguments[-1] is ... else list(arguments)
        if len(kinds) == len(value):
            return tuple(_typed(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
    elif origin is dict and isinstance(value, Mapping):
        return dict(value)
    elif kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    elif kind in (int, str, bool) and type(value) is kind:
        return value
    elif kind is Path and isinstance(value, str):
        return Path(value)
    if origin is tuple:
        wanted = "a list" if arguments[-1] is ... else f"a list of {len(arguments)}"
    else:
        wanted = _WANTED.get(origin or kind, str(kind))
    raise ValueError(f"{where} is {value!r}; it must be {wanted}")


def _unknown(key: str, where: str) -> str:
    known = keys()
    leaf = key.rpartition(".")[2]
    near = difflib.get_close_matches(key, known, n=3, cutoff=0.6)
    near += [name for name in known if name.rpartition(".")[2] == leaf and name not in near]
    if near:
        return f"unknown key {key}: did you mean {' or '.join(near)}?"
    within = [name for name in known if name.startswith(where)] if where else []
    sections = list(dict.fromkeys(name.partition(".")[0] for name in known))
    return f"unknown key {key}: {'keys' if within else 'sections'} are {', '.join(within or sections)}"


def _near(value: object, names: Sequence[Any]) -> str:
    near = difflib.get_close_matches(str(value), [str(name) for name in names], n=3)
    return f" did you mean {' or '.join(near)}?" if near else ""


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
