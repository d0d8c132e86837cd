"""Recipes, one module each with a function `recipe() -> TrainConfig`; with an underscore, shared code."""
