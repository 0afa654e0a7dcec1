"""scikit-learn's handwritten digits: small, real, and always there."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from annotated_types import Gt, Lt

from attar.data.source import TensorSource
from attar.data.splits import Splits, split


def digits(*, seed: int = 0, test: Annotated[float, Gt(0), Lt(1)] = 0.4) -> Splits:
    """1,797 handwritten digits of 8 x 8 pixels in 10 classes, from scikit-learn.

    Inputs are float32 [1, 8, 8] in [0, 1] (the data have 17 grey levels). Alpaydin and Kaynak,
    "Optical Recognition of Handwritten Digits" (UCI, 1998).

    Parameters
    ----------
    seed:
        Which rows are the test part.
    test:
        The fraction of rows in the test part, stratified by digit.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    images = data.images.astype(np.float32) / 16
    return Splits(
        *split(TensorSource(images, data.target, classes=10, name="digits"), test, seed=seed)
    )
