"""Yeast: a classic multi-label table, from the package that carries it."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

from annotated_types import Gt, Lt

from attar.data.splits import Splits
from attar.data.tables import csv
from attar.runtime import DataError

_LABELS = [f"Class{number}" for number in range(1, 15)]


def yeast(
    *, path: str | None = None, seed: int = 0, test: Annotated[float, Gt(0), Lt(1)] = 0.38
) -> Splits:
    """2,417 genes of yeast, 103 numbers each, with 14 labels: groups of functions of the protein.

    Inputs are float32 [103], labels float32 [14] of 0 and 1; a gene has 4.24 labels on average.
    Elisseeff and Weston, "A Kernel Method for Multi-Labelled Classification" (2001).

    Parameters
    ----------
    path:
        A CSV file, plain or gzipped, with the label columns Class1 to Class14; every other column
        is an input. None is the file in the Python package ``river``, which is only read, not
        imported.
    seed:
        Which rows are the test part.
    test:
        The fraction of rows in the test part, drawn at random: 918 rows, as many but for one as
        in the usual split, whose rows the file does not tell.

    Raises
    ------
    DataError
        ``river`` is not installed; what :func:`~attar.data.csv` raises of the file.
    """
    file = path or _in_river()
    return csv(train=file, target=_LABELS, seed=seed, test_fraction=test)


def _in_river() -> str:
    found = find_spec("river")
    for folder in (found and found.submodule_search_locations) or ():
        file = Path(folder) / "datasets" / "yeast.csv.gz"
        if file.is_file():
            return str(file)
    raise DataError(
        "yeast: the Python package river, which has the data, is not installed; install it "
        "(pip install --no-deps river) or give the option path"
    )
