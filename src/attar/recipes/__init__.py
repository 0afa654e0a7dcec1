"""Recipes: one file, or one Python object, from data to verdict."""

from attar.recipes.caching import ask_again, cache_recipe
from attar.recipes.document import Document, parse, read
from attar.recipes.recipe import Goal, Loaded, Recipe, TeacherPlan, load_recipe, resolve
from attar.recipes.rooms import SUPPLIED, rooms
from attar.recipes.run import check, run

__all__ = [
    "SUPPLIED",
    "Document",
    "Goal",
    "Loaded",
    "Recipe",
    "TeacherPlan",
    "ask_again",
    "cache_recipe",
    "check",
    "load_recipe",
    "parse",
    "read",
    "resolve",
    "rooms",
    "run",
]
