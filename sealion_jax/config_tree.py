"""Trees of frozen dataclasses: to and from JSON exactly, values from text, and names that nearly match.

Types are read from the annotations, so nothing is registered anywhere. Understood are bool, int, float, str,
Literal, Optional, tuples, mappings with string keys, dataclasses, and unions of dataclasses, which JSON tells
apart by a "kind".
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import io
import itertools
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, Union

from sealion_jax.errors import UserError

KIND = "kind"


def nearest(name: str, known: Sequence[str], count: int = 1) -> list[str]:
    """The names that `name` may have been meant to be, best first: misspelt, then shortened, then alike."""
    last = name.lstrip("-").rsplit(".", 1)[-1]
    ends = [other for other in known if f"-{other.replace('.', '-')}".endswith(f"-{last}")]
    tries = ((known, 0.8), (ends, 0.0), (known, 0.6))
    close = [difflib.get_close_matches(name, names, n=count, cutoff=cutoff) for names, cutoff in tries]
    return list(dict.fromkeys(match for matches in close for match in matches))[:count]


@functools.cache
def field_types(cls: type) -> Mapping[str, Any]:
    """Name -> resolved annotation of each field of a dataclass."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def union_members(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, None left out; any other annotation is its own only member."""
    if typing.get_origin(annotation) in (Union, types.UnionType):
        return tuple(member for member in typing.get_args(annotation) if member is not type(None))
    return (annotation,)


def is_optional(annotation: Any) -> bool:
    """Whether None is among the values."""
    return annotation is type(None) or type(None) in typing.get_args(annotation)


def is_mapping(annotation: Any) -> bool:
    """Whether values are dicts."""
    origin = typing.get_origin(annotation)
    return isinstance(origin, type) and issubclass(origin, Mapping)


def dataclass_members(annotation: Any) -> tuple[type, ...]:
    """The dataclasses among a union's members."""
    members: list[Any] = [member for member in union_members(annotation) if dataclasses.is_dataclass(member)]
    return tuple(members)


def to_plain(value: Any, annotation: Any) -> Any:
    """The value in JSON's own types."""
    if dataclasses.is_dataclass(value):
        hints = field_types(type(value))
        plain = {name: to_plain(getattr(value, name), hint) for name, hint in hints.items()}
        return {KIND: type(value).__name__, **plain} if len(dataclass_members(annotation)) > 1 else plain
    if isinstance(value, Mapping):
        _, item = typing.get_args(_member(annotation, is_mapping))
        return {key: to_plain(inner, item) for key, inner in value.items()}
    if isinstance(value, tuple):
        items = _tuple_items(_member(annotation, _is_tuple), len(value))
        return [to_plain(inner, item) for inner, item in zip(value, items, strict=True)]
    return value


def from_plain(plain: Any, annotation: Any, *, path: str = "") -> Any:
    """The value that `to_plain` gave `plain` for; fields that are missing take their defaults.

    Raises:
        UserError: a value of another type, a field that is unknown or required and missing; names its path.
    """
    if plain is None and is_optional(annotation):
        return None
    if isinstance(plain, dict):
        members = dataclass_members(annotation)
        if members:
            return _dataclass_from_plain(plain, members, path)
        if any(map(is_mapping, union_members(annotation))):
            _, item = typing.get_args(_member(annotation, is_mapping))
            return {key: from_plain(inner, item, path=_join(path, key)) for key, inner in plain.items()}
    if isinstance(plain, list) and any(map(_is_tuple, union_members(annotation))):
        items = _tuple_items(_member(annotation, _is_tuple), len(plain))
        pairs = enumerate(zip(plain, items, strict=True))
        return tuple(from_plain(inner, item, path=_join(path, str(k))) for k, (inner, item) in pairs)
    if not any(_is_scalar_of(plain, member) for member in union_members(annotation)):
        raise UserError(f"{path or 'value'} is {plain!r}; expected {expectation(annotation)}")
    return plain


def check_types(value: Any, annotation: Any, *, path: str = "") -> None:
    """Refuses a value that its annotation does not allow, and that JSON would not give back.

    Raises:
        UserError: the first such value; names its path.
    """
    members = union_members(annotation)
    if value is None and is_optional(annotation):
        return
    if type(value) in members and dataclasses.is_dataclass(value):
        for name, hint in field_types(type(value)).items():
            check_types(getattr(value, name), hint, path=_join(path, name))
    elif isinstance(value, Mapping) and any(map(is_mapping, members)):
        key_type, item = typing.get_args(_member(annotation, is_mapping))
        for key, inner in value.items():
            check_types(key, key_type, path=f"a name in {path}")
            check_types(inner, item, path=_join(path, key))
    elif isinstance(value, tuple) and any(map(_is_tuple, members)):
        items = _tuple_items(_member(annotation, _is_tuple), len(value))
        for label, inner, item in zip(entry_labels(value), value, items, strict=True):
            check_types(inner, item, path=_join(path, label))
    elif isinstance(value, list) and any(map(_is_tuple, members)):
        raise UserError(f"{path} is a list; expected a tuple, which cannot be changed later")
    elif not any(_is_scalar_of(value, member) for member in members):
        raise UserError(f"{path or 'value'} is {value!r}; expected {expectation(annotation)}")


def parse_value(annotation: Any, texts: Sequence[str]) -> Any:
    """The value that the words of a command line stand for.

    Raises:
        ValueError: they are not of this type.
    """
    if is_optional(annotation) and [text.lower() for text in texts] == ["none"]:
        return None
    (member,) = union_members(annotation) if len(union_members(annotation)) == 1 else (annotation,)
    if is_mapping(member):
        return _parse_mapping(member, texts)
    if _is_tuple(member):
        if [text.lower() for text in texts] == ["none"]:
            return ()
    else:
        if len(texts) != 1:
            raise ValueError(f"one value, not {len(texts)}")
        if member is str:
            return texts[0]
        if member is bool and texts[0].lower() in ("true", "false"):
            return texts[0].lower() == "true"
    return _parse_with_tyro(member, texts)


def _parse_with_tyro(annotation: Any, texts: Sequence[str]) -> Any:
    import tyro

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            return tyro.cli(annotation, args=list(texts), console_outputs=False, add_help=False)
    except SystemExit as error:
        raise ValueError(f"{' '.join(texts)!r} is not {expectation(annotation)}") from error


def _parse_mapping(annotation: Any, texts: Sequence[str]) -> dict[str, Any]:
    _, item = typing.get_args(annotation)
    if [text.lower() for text in texts] == ["none"]:
        return {}
    pairs = [text.partition("=") for text in texts]
    if not pairs or any(not (name and equals) for name, equals, _ in pairs):
        raise ValueError(f"{' '.join(texts)!r} is not {expectation(annotation)}")
    return {name: parse_value(item, [text]) for name, _, text in pairs}


def expectation(annotation: Any) -> str:
    """What a value of this type looks like, in words, with an example."""
    words = [_member_expectation(member) for member in union_members(annotation)]
    return " or ".join([*words, *(["none"] if is_optional(annotation) else [])])


def _member_expectation(member: Any) -> str:
    simple = {
        bool: "true or false",
        int: "a whole number, such as 1000",
        float: "a number, such as 1e-5",
        str: "a text",
    }
    if member in simple:
        return simple[member]
    if typing.get_origin(member) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(member)))
    if is_mapping(member):
        return "name=value pairs, such as id=id.jsonl th=th.jsonl (or none for no entry)"
    if _is_tuple(member):
        return "a list of values (or none for no entry)"
    if dataclasses.is_dataclass(member):
        return f"a {getattr(member, '__name__', member)}"
    return str(member)


def differences(old: Any, new: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted path, old value, new value) of every leaf that differs; of the whole where kinds differ."""
    if dataclasses.is_dataclass(old) and type(old) is type(new):
        for field in dataclasses.fields(old):
            yield from differences(
                getattr(old, field.name), getattr(new, field.name), _join(path, field.name)
            )
    elif isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in dict.fromkeys([*old, *new]):
            yield from differences(old.get(key), new.get(key), _join(path, key))
    elif isinstance(old, tuple) and isinstance(new, tuple) and (labels := _common_labels(old, new)):
        for label, before, after in itertools.zip_longest(labels, old, new):
            yield from differences(before, after, _join(path, label))
    elif old != new:
        yield path, old, new


def entry_labels(entries: tuple[Any, ...]) -> list[str]:
    """What the entries of a tuple are called: by their own `name`, else by their number."""
    return [str(getattr(entry, "name", k)) for k, entry in enumerate(entries)]


def _common_labels(old: tuple[Any, ...], new: tuple[Any, ...]) -> list[str] | None:
    """The labels of two tuples of dataclasses one of which only goes on longer; else None."""
    if not all(map(dataclasses.is_dataclass, (*old, *new))):
        return None
    first, second = entry_labels(old), entry_labels(new)
    common = min(len(first), len(second))
    return max(first, second, key=len) if first[:common] == second[:common] else None


def _dataclass_from_plain(plain: dict[str, Any], members: tuple[type, ...], path: str) -> Any:
    cls = members[0]
    if len(members) > 1:
        by_name = {member.__name__: member for member in members}
        if plain.get(KIND) not in by_name:
            raise UserError(
                f"{_join(path, KIND)} is {plain.get(KIND)!r}; expected one of {', '.join(by_name)}"
            )
        cls = by_name[plain[KIND]]
        plain = {name: value for name, value in plain.items() if name != KIND}
    hints = field_types(cls)
    for name in plain:
        if name not in hints:
            raise UserError(f"unknown field {_join(path, name)}: was this written by another version?")
    for field in dataclasses.fields(cls):
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and field.name not in plain:
            raise UserError(f"field {_join(path, field.name)} is missing")
    return cls(
        **{name: from_plain(value, hints[name], path=_join(path, name)) for name, value in plain.items()}
    )


def _is_scalar_of(plain: Any, member: Any) -> bool:
    if typing.get_origin(member) is Literal:
        return plain in typing.get_args(member)
    if member is float:
        return isinstance(plain, int | float) and not isinstance(plain, bool)
    if member is int:
        return isinstance(plain, int) and not isinstance(plain, bool)
    return member in (bool, str) and isinstance(plain, member)


def _is_tuple(annotation: Any) -> bool:
    return typing.get_origin(annotation) is tuple


def _member(annotation: Any, wanted: Any) -> Any:
    return next(member for member in union_members(annotation) if wanted(member))


def _tuple_items(annotation: Any, length: int) -> tuple[Any, ...]:
    items = typing.get_args(annotation)
    return items[:1] * length if len(items) == 2 and items[1] is Ellipsis else items


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
