# A Keras model teaches a PyTorch student: a convolutional net that saw 100 labels says what it sees
# in 1,078 images, as probabilities. The baseline is the same student on the 100 labels.
# Needs keras, which runs on torch here: pip install keras
# python examples/keras_teacher.py
"""Distil from a Keras model: images channels last, probabilities instead of logits."""

from __future__ import annotations

import copy
import os
from functools import partial
from typing import Any

import torch

import attar

LABELS = 100


def keras_model(data: attar.data.Source, epochs: int) -> Any:
    """A small convolutional net that ends in a softmax, trained by Keras."""
    os.environ.setdefault("KERAS_BACKEND", "torch")  # read when keras is imported
    import keras

    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(32, 3, padding="same", activation="relu"),
            keras.layers.MaxPooling2D(),
            keras.layers.Conv2D(64, 3, padding="same", activation="relu"),
            keras.layers.Flatten(),
            keras.layers.Dropout(0.5),
            keras.layers.Dense(10, activation="softmax"),
        ]
    )
    model.compile("adam", "sparse_categorical_crossentropy")
    rows = data.rows(torch.arange(len(data)))
    images = rows["inputs"].movedim(1, -1).numpy()
    model.fit(images, rows["labels"].numpy(), batch_size=20, epochs=epochs, verbose=0)
    return model


def main(epochs: int = 20) -> attar.evaluation.Verdict:
    """Train teacher, baseline and student; print and return the verdict."""
    train, test = attar.data.digits()
    _, few = attar.data.split(train, LABELS / len(train), seed=0)
    everything = attar.data.TensorSource(train.rows(torch.arange(len(train)))["inputs"])
    task = attar.tasks.ImageClassification(classes=10)
    steps = -(-len(everything) // 20) * epochs  # of 20 rows; the same for all three
    teacher = attar.teachers.Function(
        partial(keras_model(few, steps // 5), training=False),
        task,
        gives="probabilities",
        channels_last=True,
        name="the Keras model",
    )

    torch.manual_seed(0)
    student = attar.models.build("mlp", data=few, widths=[32])
    baseline = copy.deepcopy(student)
    soft = attar.Term(partial(attar.losses.kl_divergence, temperature=2.0))
    attar.train(baseline, few, task, epochs=steps // 5, batch_size=20)
    attar.distill(
        student, teacher, everything, task, [soft], label_weight=0, epochs=epochs, batch_size=20
    )

    models = {"teacher": teacher, "baseline": baseline, "student": student}
    verdict = attar.compare(models, test, task)
    for name, model in models.items():
        print(f"{name:9} {attar.evaluate(model, test, task)}")
    print(f"{teacher.lost}\n{verdict}")
    return verdict


if __name__ == "__main__":
    main()
