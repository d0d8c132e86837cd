"""Command-line overrides of a recipe's fields: `--some.field VALUE`."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

from sealion_jax.config_tree import (
    dataclass_members,
    entry_labels,
    expectation,
    field_types,
    is_mapping,
    is_optional,
    parse_value,
    union_members,
)
from sealion_jax.errors import UserError
from sealion_jax.recipe.config import TrainConfig
from sealion_jax.recipe.replacing import Path, replace_unchecked, replaced
from sealion_jax.recipe.suggestions import suggest


class Found(NamedTuple):
    """A field, or a group of fields, that a name leads to."""

    path: Path
    annotation: Any
    """Its type."""
    rest: list[str]
    """The steps of the name that are not found below it."""


def apply_overrides(config: TrainConfig, argv: Sequence[str], *, options: Sequence[str] = ()) -> TrainConfig:
    """The configuration with the fields that `argv` names set, all at once.

    A name is the path to a field, with `-` or `_`: `--optimizer.beta1 0.9`, `--optimizer.beta1=0.9`. An entry
    of a mapping is named by its key, an entry of a tuple by its own `name` or its number:
    `--data.sources.id.weight 2`. A field that holds one of several dataclasses takes the name of another of
    them, or its initials, and keeps what both have: `--optimizer.schedule wsd`. A group that is none is there
    once a field of it is named, if all its fields have defaults: `--lora.rank 16`.

    Args:
        options: the command's own, without dashes: an unknown name may have been meant to be one of these.

    Raises:
        UserError: a name that is unknown (the nearest ones are suggested), or a value of another type.
    """
    overrides = list(_split(argv))
    changes = _chosen_groups(config, overrides)
    # Checked in the end, with all changes: what only some of them make may be refused.
    sketch = replaced(config, changes, replace=replace_unchecked)
    for name, texts in overrides:
        path, annotation, rest = found = _follow(sketch, name)
        if rest:
            raise _unknown(sketch, name, found, options)
        members = dataclass_members(annotation)
        if _chooses_kind(annotation, texts):
            continue
        if members and not (is_optional(annotation) and [text.lower() for text in texts] == ["none"]):
            fields = ", ".join(f"--{name}.{field.replace('_', '-')}" for field in field_types(members[0]))
            raise UserError(f"--{name} is a group of fields: {fields}")
        changes[path] = _parse(name, annotation, texts, check=partial(_try, sketch, path))
    return replaced(config, changes)


def _chosen_groups(config: TrainConfig, overrides: Sequence[tuple[str, list[str]]]) -> dict[Path, Any]:
    """The groups of fields that `overrides` choose, before other overrides change these fields."""
    groups: dict[Path, Any] = {}
    for name, texts in overrides:
        path, annotation, rest = _follow(config, name)
        members = dataclass_members(annotation)
        if not rest and _chooses_kind(annotation, texts):
            groups[path] = _other_kind(_get(config, path), members, name, texts[0])
        elif rest and len(members) == 1 and _get(config, path) is None and _has_defaults(members[0]):
            groups[path] = members[0]()
    return groups


def _has_defaults(cls: type) -> bool:
    missing = dataclasses.MISSING
    return all(
        field.default is not missing or field.default_factory is not missing
        for field in dataclasses.fields(cls)
    )


def _chooses_kind(annotation: Any, texts: Sequence[str]) -> bool:
    return len(dataclass_members(annotation)) > 1 and len(texts) == 1


def override_names(config: TrainConfig) -> list[str]:
    """Every name that `apply_overrides` knows for this configuration, without the leading dashes."""
    return [".".join(path).replace("_", "-") for path in _leaf_paths(config)]


def overrides_help(config: TrainConfig) -> str:
    """A line for each field that can be overridden: name, current value, what it may be."""
    lines = []
    for path in _leaf_paths(config):
        value = _get(config, path)
        name = ".".join(path).replace("_", "-")
        shown = value
        if value is None or value == ():
            shown = "none"
        elif isinstance(value, tuple) and all(isinstance(entry, str) for entry in value):
            shown = " ".join(value)
        if dataclasses.is_dataclass(value):  # one of several, and without fields of its own
            shown = _dashed(type(value))
        lines.append(f"  --{name} {shown}    ({expectation(_annotation(config, path))})")
    return "\n".join(lines)


def _split(argv: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """(name without dashes, words of its value) of each override."""
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("--") or word == "--":
            raise UserError(f"unexpected argument {word!r}; overrides look like --some.field VALUE")
        name, equals, value = word[2:].partition("=")
        texts = [value] if equals else []
        while not equals and words and not words[0].startswith("--"):
            texts.append(words.pop(0))
        yield name, texts


def _parse(name: str, annotation: Any, texts: Sequence[str], *, check: Callable[[str], None]) -> Any:
    if not texts:
        raise UserError(f"--{name} needs a value: {expectation(annotation)}")
    try:
        return parse_value(annotation, texts)
    except ValueError as error:
        given = " ".join(texts)
        if typing.get_origin(annotation) is Literal:
            # The dataclass may have more to say of a value that it knows and refuses.
            check(given)
        raise UserError(f"--{name} {given}: expected {expectation(annotation)}") from error


def _try(config: TrainConfig, path: Path, value: Any) -> None:
    replaced(config, {path: value})


def _follow(config: TrainConfig, name: str) -> Found:
    """As far as a name on the command line leads."""
    path: Path = ()
    value: Any = config
    annotation: Any = TrainConfig
    rest = name.split(".")
    while rest:
        if dataclasses.is_dataclass(value) and rest[0].replace("-", "_") in field_types(type(value)):
            step = rest.pop(0).replace("-", "_")
            annotation = field_types(type(value))[step]
            value = getattr(value, step)
        elif isinstance(value, Mapping):
            # A key may have dots in it where nothing lies below its entry.
            step = rest.pop(0) if rest[0] in value else ".".join(rest)
            rest = rest if step in value else []
            annotation = _mapping_item(annotation)
            value = value.get(step)
        elif (
            isinstance(value, tuple)
            and value
            and dataclasses.is_dataclass(value[0])
            and (place := _place(value, rest[0])) is not None
        ):
            step = str(place)
            rest.pop(0)
            annotation, value = type(value[place]), value[place]
        else:
            break
        path = (*path, step)
    return Found(path, annotation, rest)


def _unknown(config: TrainConfig, name: str, found: Found, options: Sequence[str]) -> UserError:
    """Why no field has this name, and which ones have one like it."""
    path, annotation, rest = found
    value = _get(config, path)
    group = ".".join(path).replace("_", "-")
    if value is None and dataclass_members(annotation):
        return UserError(
            f"unknown override --{name}: {group} is none in this recipe, so it has no fields to set"
        )
    for member in dataclass_members(annotation):
        if type(value) is not member and rest[0].replace("-", "_") in field_types(member):
            return UserError(
                f"--{name} is a field of {member.__name__}, and {group} is a {type(value).__name__} in this "
                f"recipe; choose the other kind with --{group} {_dashed(member)}"
            )
    close = " or ".join(f"--{other}" for other in suggest(name, [*override_names(config), *options]))
    return UserError(
        f"unknown override --{name}; did you mean {close}? "
        "`python -m sealion_jax.train RECIPE --help` lists every field"
    )


def _dashed(cls: type) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "-", cls.__name__).lower()


def _place(values: tuple[Any, ...], step: str) -> int | None:
    """The number of the entry that is called `step`, or is number `step`."""
    labels = entry_labels(values)
    if step in labels:
        return labels.index(step)
    return int(step) if step.isdecimal() and int(step) < len(values) else None


def _other_kind(value: Any, members: tuple[type, ...], name: str, text: str) -> Any:
    """An instance of the dataclass that `text` names, with the fields of `value` that it has too."""
    wanted = text.replace("-", "").replace("_", "").lower()
    named = [member for member in members if member.__name__.lower().startswith(wanted)]
    named = named or [member for member in members if _initials(member) == wanted]
    if len(named) != 1:
        raise UserError(
            f"--{name} {text}: expected one of {', '.join(member.__name__ for member in members)}"
        )
    shared = {field: getattr(value, field) for field in field_types(named[0]) if hasattr(value, field)}
    return named[0](**shared)


def _initials(cls: type) -> str:
    return "".join(letter for letter in cls.__name__ if letter.isupper()).lower()


def _mapping_item(annotation: Any) -> Any:
    (mapping,) = (member for member in union_members(annotation) if is_mapping(member))
    return mapping.__args__[1]


def _annotation(config: Any, path: Path) -> Any:
    annotation: Any = type(config)
    value = config
    for step in path:
        if dataclasses.is_dataclass(value):
            annotation, value = field_types(type(value))[step], getattr(value, step)
        elif isinstance(value, Mapping):
            annotation, value = _mapping_item(annotation), value[step]
        else:
            value = value[_place(value, step)]
            annotation = type(value)
    return annotation


def _get(value: Any, path: Path) -> Any:
    for step in path:
        if dataclasses.is_dataclass(value):
            value = getattr(value, step)
        elif isinstance(value, Mapping):
            value = value[step]
        else:
            value = value[_place(value, step)]
    return value


def _leaf_paths(value: Any) -> Iterator[Path]:
    """Paths of the fields that take a value on the command line."""
    if dataclasses.is_dataclass(value):
        for name in field_types(type(value)):
            inner = getattr(value, name)
            below = [(name, *path) for path in _leaf_paths(inner)]
            if not below or isinstance(inner, Mapping):
                yield (name,)
            yield from below
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            below = [(key, *path) for path in _leaf_paths(inner)]
            yield from below or [(key,)]
    elif isinstance(value, tuple):
        for label, inner in zip(entry_labels(value), value, strict=True):
            yield from ((label, *path) for path in _leaf_paths(inner))
