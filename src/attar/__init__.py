"""attar: turn a large model into a small one that keeps what the large one knows.

task = attar.tasks.ImageClassification(classes=10)
train, test = attar.data.digits()
teacher = attar.Teacher(attar.models.load("runs/digits/teacher"), task)
student = attar.models.build("mlp", data=train)
student = attar.distill(student, teacher, train, task, [attar.Term(kl_divergence)])
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# The door: each name and the room it stands in, opened when it is first asked for.
_ROOMS = {
    "Cached": "teachers",
    "EMA": "teachers",
    "Ensemble": "teachers",
    "Group": "models",
    "Objective": "training",
    "Plan": "training",
    "Recipe": "recipes",
    "Tap": "signals",
    "Teacher": "teachers",
    "Term": "training",
    "cache": "teachers",
    "check": "recipes",
    "compare": "evaluation",
    "distill": "training",
    "evaluate": "evaluation",
    "export": "exporting",
    "factorize": "compression",
    "fit": "training",
    "mutual": "training",
    "prune": "compression",
    "quantize": "compression",
    "run": "recipes",
    "search": "recipes",
    "shrink": "compression",
    "sparsify": "compression",
    "synthesize": "teachers",
    "train": "training",
    "transfer": "compression",
}
_OPEN = {
    "compression",
    "data",
    "evaluation",
    "exporting",
    "losses",
    "models",
    "recipes",
    "reporting",
    "runtime",
    "signals",
    "tasks",
    "teachers",
    "training",
}

__all__ = [
    "__version__",
    *sorted([*_ROOMS, *_OPEN]),
]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        value = getattr(importlib.import_module(f"attar.{_ROOMS[name]}"), name)
    elif name in _OPEN:
        value = importlib.import_module(f"attar.{name}")
    else:
        raise AttributeError(f"module 'attar' has no attribute '{name}'")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return list(__all__)
