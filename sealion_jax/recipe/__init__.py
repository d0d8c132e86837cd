"""A run's whole configuration: what it is, where it comes from, overrides, and what a resume may change."""

from sealion_jax.recipe.config import TrainConfig, from_json, to_json
from sealion_jax.recipe.loading import load_recipe, recipe_names
from sealion_jax.recipe.overrides import apply_overrides, override_names, overrides_help
from sealion_jax.recipe.resume import RESUME_RULES, check_resume

__all__ = [
    "RESUME_RULES",
    "TrainConfig",
    "apply_overrides",
    "check_resume",
    "from_json",
    "load_recipe",
    "override_names",
    "overrides_help",
    "recipe_names",
    "to_json",
]
