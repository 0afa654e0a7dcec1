"""Run on each rank: the small cases, or ``trainings``, or those that are named."""

from __future__ import annotations

import sys

import gradients
import language
import masking
import sharing
import whole
from common import main

if __name__ == "__main__":
    trainings = whole.make()
    if sys.argv[1:] == ["trainings"]:
        main(trainings, list(trainings))
    texts = language.make()
    if sys.argv[1:] == ["texts"]:
        main(texts, list(texts))
    masks = masking.make()
    if sys.argv[1:] == ["masks"]:
        main(masks, list(masks))
    small = {**gradients.make(), **sharing.make()}
    usual = [name for name in small if "few" not in name]
    main({**small, **trainings, **masks}, sys.argv[1:] or usual)
