"""Finding a recipe by its name in `configs/`, or in a Python file."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import pkgutil
import re
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from sealion_jax.config_tree import nearest
from sealion_jax.errors import UserError
from sealion_jax.recipe.config import TrainConfig
from sealion_jax.recipe.overrides import apply_overrides

DEFAULT_RECIPE = "cpt_tiny"
RECIPES = "sealion_configs"
"""The package that `configs/` is installed as. It imports this one, so it is only ever imported by name."""


def load_recipe(name_or_path: str | None = None) -> TrainConfig:
    """The configuration that a recipe builds.

    Args:
        name_or_path: a name in `configs/`; a Python file that defines `recipe() -> TrainConfig`, which is run
            as code with all of your rights; None for the embedded default, `cpt_tiny`.

    Raises:
        UserError: no such recipe (names those that are alike and those that exist), or it is not one.
    """
    name = DEFAULT_RECIPE if name_or_path is None else name_or_path
    is_path = name.endswith(".py") or "/" in name
    module = _module_from_file(name) if is_path else _module_by_name(name)
    build = getattr(module, "recipe", None)
    if not callable(build):
        raise UserError(f"{name} defines no function recipe() -> TrainConfig")
    try:
        config = build()
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    except TypeError as error:
        if told := _misuse_of_fields(error):
            raise told from error
        raise
    if not isinstance(config, TrainConfig):
        raise UserError(f"recipe() of {name} must return a TrainConfig, not a {type(config).__name__}")
    return config


def load_and_override(
    name_or_path: str | None, overrides: Sequence[str], *, options: Sequence[str] = ()
) -> TrainConfig:
    """The configuration of a command line: a recipe's, with the overrides that follow it.

    Raises:
        UserError: from `load_recipe` or `apply_overrides`; tells if a recipe seems to be named too late.
    """
    config = load_recipe(name_or_path)
    try:
        return apply_overrides(config, overrides, options=options)
    except UserError as error:
        late = next((word for word in overrides if word.endswith(".py") or word in recipe_names()), None)
        if late is None or name_or_path is not None:
            raise
        raise UserError(f"{error}; if {late} is the recipe, it comes first, before all options") from error


def _misuse_of_fields(error: TypeError) -> UserError | None:
    """The mistake of a recipe that gives a dataclass too many fields or too few; None for another error."""
    found = re.fullmatch(
        r"(?P<name>\w+)\.__init__\(\) (?:got an unexpected keyword argument '(?P<given>\w+)'"
        r"(?:\. Did you mean .*)?"  # Python's own, from 3.13 on
        r"|missing \d+ required keyword-only arguments?: (?P<missing>.*))",
        str(error),
    )
    if found is None:
        return None
    frame, line = list(traceback.walk_tb(error.__traceback__))[-1]
    name, given, place = found["name"], found["given"], f"{frame.f_code.co_filename}, line {line}"
    if found["missing"]:
        return UserError(f"{place}: {name} needs {found['missing']}")
    named = (getattr(module, name, None) for module in frame.f_globals.values())
    cls = frame.f_globals.get(name) or next((cls for cls in named if cls is not None), None)
    if not dataclasses.is_dataclass(cls):
        return UserError(f"{place}: {name} has no field {given}")
    fields = [field.name for field in dataclasses.fields(cls)]
    close = nearest(given, fields)
    hint = f"; did you mean {close[0]}?" if close else "."
    return UserError(f"{place}: {name} has no field {given}{hint} Its fields: {', '.join(fields)}")


def recipe_names() -> list[str]:
    """The names in `configs/`; modules that begin with an underscore are shared by recipes, not recipes."""
    modules = pkgutil.iter_modules(importlib.import_module(RECIPES).__path__)
    return sorted(module.name for module in modules if not module.name.startswith("_"))


def _module_by_name(name: str) -> ModuleType:
    names = recipe_names()
    if name not in names:
        close = nearest(name, names)
        hint = f"did you mean {close[0]}? " if close else ""
        raise UserError(
            f"unknown recipe {name!r}; {hint}Recipes: {', '.join(names)}; or give the path of a Python file"
        )
    return importlib.import_module(f"{RECIPES}.{name}")


def _module_from_file(path: str) -> ModuleType:
    file = Path(path)
    if not file.is_file():
        raise UserError(f"no recipe file {path}; give a .py file, or one of {', '.join(recipe_names())}")
    # dataclasses that the recipe defines look their module up in sys.modules.
    name = f"sealion_recipe_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} is not a Python file (.py)")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise UserError(f"{path}, line {error.lineno}: {error.msg}") from error
    return module
