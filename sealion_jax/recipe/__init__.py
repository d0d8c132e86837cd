"""A run's whole configuration: what it is, where it comes from, overrides, and what a resume may change."""

from sealion_jax.recipe.config import TrainConfig, from_json, read_fingerprints, to_json
from sealion_jax.recipe.inputs import input_fingerprints, resolve_model
from sealion_jax.recipe.loading import load_and_override, load_recipe, recipe_names
from sealion_jax.recipe.overrides import apply_overrides, override_names, overrides_help
from sealion_jax.recipe.resume import RESUME_RULES, check_resume

__all__ = [
    "RESUME_RULES",
    "TrainConfig",
    "apply_overrides",
    "check_resume",
    "from_json",
    "input_fingerprints",
    "load_and_override",
    "load_recipe",
    "override_names",
    "overrides_help",
    "read_fingerprints",
    "recipe_names",
    "resolve_model",
    "to_json",
]
