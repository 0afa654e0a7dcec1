"""Recipes: one file, or one Python object, from data to verdict."""

from attar.recipes.caching import ask_again, cache_recipe
from attar.recipes.document import Document, parse, read
from attar.recipes.recipe import Goal, Loaded, Recipe, Search, TeacherPlan, load_recipe, resolve
from attar.recipes.rooms import SUPPLIED, rooms
from attar.recipes.run import check, run
from attar.recipes.search import Found, search
from attar.recipes.search_trials import Trial

__all__ = [
    "SUPPLIED",
    "Document",
    "Found",
    "Goal",
    "Loaded",
    "Recipe",
    "Search",
    "TeacherPlan",
    "Trial",
    "ask_again",
    "cache_recipe",
    "check",
    "load_recipe",
    "parse",
    "read",
    "resolve",
    "rooms",
    "run",
    "search",
]
