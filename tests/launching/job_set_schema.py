"""JobSet's schema, with the Job and Pod inside it, from models generated from their OpenAPI definitions."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet
from pydantic import BaseModel

# How the definitions tell the words that a field may have; a plain string in the models.
_ENUMERATIONS = (r"Possible enum values:(.*)", r"Valid values are ([^.]*)\.")


def check_job_set(manifest: Mapping[str, Any]) -> None:
    """Raises ValueError unless the manifest is a JobSet: fields known, of their types, and of allowed words.

    The models leave out fields that they do not know, and put "" where a text is missing; so what they give
    back is compared with what went in.
    """
    try:
        model = JobsetV1alpha2JobSet.from_dict(dict(manifest))
    except (AttributeError, KeyError, TypeError) as error:  # what generated code meets in an ill-typed tree
        raise ValueError(f"not a JobSet: {error!r}") from error
    assert model is not None
    wrong = [*_differences(manifest, model.to_dict(), "JobSet"), *_wrong_words(model, "JobSet")]
    if wrong:
        raise ValueError("; ".join(wrong))


def _differences(given: Any, kept: Any, path: str) -> Iterator[str]:
    if isinstance(given, Mapping) and isinstance(kept, Mapping):
        for key, value in given.items():
            if key in kept:
                yield from _differences(value, kept[key], f"{path}.{key}")
            else:
                yield f"{path}.{key} is not in the schema"
        yield from (f"{path}.{key} is missing" for key in kept if kept[key] == "" and key not in given)
    elif isinstance(given, Sequence) and not isinstance(given, str) and isinstance(kept, Sequence):
        if len(given) != len(kept):
            yield f"{path} has elements that are not in the schema"
        for k, (one, other) in enumerate(zip(given, kept, strict=False)):
            yield from _differences(one, other, f"{path}[{k}]")
    elif given != kept or type(given) is not type(kept):
        yield f"{path} is {given!r}, and was taken for {kept!r}"


def _wrong_words(model: BaseModel, path: str) -> Iterator[str]:
    for name, field in type(model).model_fields.items():
        here = f"{path}.{field.alias or name}"
        value = getattr(model, name)
        known = _words(field.description or "")
        if isinstance(value, str) and value and known and value not in known:
            yield f"{here} is {value!r}, not one of {', '.join(sorted(known))}"
        values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
        for k, one in enumerate(values):
            if isinstance(one, BaseModel):
                yield from _wrong_words(one, f"{here}[{k}]" if isinstance(value, list) else here)


def _words(description: str) -> set[str]:
    for pattern in _ENUMERATIONS:
        found = re.search(pattern, description, flags=re.DOTALL)
        if found and "Possible enum" in pattern:
            return set(re.findall(r'`"(\w+)"`', found[1]))
        if found:
            return set(re.findall(r"\w+", found[1])) - {"and", "or"}
    return set()
