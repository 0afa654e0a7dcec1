"""A SavedModel of TensorFlow teaches through a function; run by make test-deep."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import attar
from attar.runtime import DataError
from attar.teachers import Function

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
tensorflow = pytest.importorskip("tensorflow")

TASK = attar.tasks.ImageClassification(classes=10)


@pytest.fixture(scope="module")
def saved(digits: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A net of TensorFlow's own layers, trained on digits, saved and read again."""
    tensorflow.random.set_seed(0)
    rows = digits.train.rows(torch.arange(len(digits.train)))
    images, labels = rows["inputs"].movedim(1, -1).numpy(), rows["labels"].numpy()

    class Net(tensorflow.Module):
        def __init__(self) -> None:
            super().__init__()
            start = tensorflow.random.stateless_normal
            self.first = tensorflow.Variable(start([64, 64], [0, 1]) * 0.2)
            self.last = tensorflow.Variable(start([64, 10], [0, 2]) * 0.2)

        @tensorflow.function(input_signature=[tensorflow.TensorSpec([None, 8, 8, 1])])
        def serve(self, x: Any) -> Any:
            hidden = tensorflow.nn.relu(tensorflow.reshape(x, [-1, 64]) @ self.first)
            return tensorflow.nn.softmax(hidden @ self.last)

    net = Net()
    for _ in range(200):
        with tensorflow.GradientTape() as tape:
            chances = net.serve(images)
            picked = tensorflow.gather(chances, labels, axis=1, batch_dims=1)
            loss = -tensorflow.reduce_mean(tensorflow.math.log(picked + 1e-7))
        weights = [net.first, net.last]
        for weight, slope in zip(weights, tape.gradient(loss, weights), strict=True):
            weight.assign_sub(2.0 * slope)
    folder = tmp_path_factory.mktemp("saved")
    tensorflow.saved_model.save(net, str(folder))
    return tensorflow.saved_model.load(str(folder))


def test_it_says_what_tensorflow_says(saved: Any, digits: Any) -> None:
    teacher = Function(saved.serve, TASK, gives="probabilities", channels_last=True, version="1")
    inputs = digits.test.rows(torch.arange(200))["inputs"]
    expected = saved.serve(inputs.movedim(1, -1).numpy()).numpy()
    found = teacher(inputs).double().softmax(1).numpy()
    raised = np.maximum(expected, 1e-7)
    assert np.abs(found - raised / raised.sum(1, keepdims=True)).max() < 1e-6
    assert attar.evaluate(teacher, digits.test, TASK)["accuracy"] > 0.9


def test_it_teaches(saved: Any, digits: Any) -> None:
    teacher = Function(saved.serve, TASK, gives="probabilities", channels_last=True)
    bare = attar.data.TensorSource(digits.train.rows(torch.arange(len(digits.train)))["inputs"])
    torch.manual_seed(0)
    student = attar.models.build("mlp", data=digits.train, widths=[32])
    soft = attar.Term(partial(attar.losses.kl_divergence, temperature=2.0))
    options: dict[str, Any] = {"epochs": 10, "batch_size": 32, "label_weight": 0}
    attar.distill(student, teacher, bare, TASK, [soft], **options)
    same = attar.compare({"teacher": teacher, "student": student}, digits.test, TASK)
    agreement = same.models["distilled"].agreement
    assert agreement is not None
    assert agreement["agreement"] > 0.9


def test_channels_in_the_wrong_place_are_named(saved: Any, digits: Any) -> None:
    teacher = Function(saved.serve, TASK, gives="probabilities", name="the saved model")
    with pytest.raises(DataError, match=r"the saved model failed on inputs \[4, 1, 8, 8\]"):
        teacher(digits.test.rows(torch.arange(4))["inputs"])


def test_a_keras_model_of_tensorflow_is_exported_and_teaches(digits: Any, tmp_path: Path) -> None:
    os.environ["KERAS_BACKEND"] = "tensorflow"
    keras = pytest.importorskip("keras")
    if keras.backend.backend() != "tensorflow":
        pytest.skip("keras was imported with another backend")
    model = keras.Sequential(
        [keras.Input((8, 8, 1)), keras.layers.Flatten(), keras.layers.Dense(10)]
    )
    model.export(str(tmp_path / "saved"), verbose=False)
    loaded = tensorflow.saved_model.load(str(tmp_path / "saved"))
    inputs = digits.test.rows(torch.arange(50))["inputs"]
    direct = Function(model, TASK, channels_last=True)(inputs)
    torch.testing.assert_close(Function(loaded.serve, TASK, channels_last=True)(inputs), direct)
