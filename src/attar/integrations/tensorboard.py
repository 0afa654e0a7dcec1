"""To TensorBoard: event files, one folder for each stage and split."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from attar.integrations.log import Point
from attar.integrations.sink import Opening


class TensorBoard:
    """Curves of one name lie in one chart: ``distilled-0/train`` beside ``baseline-0/train``."""

    def __init__(self, opening: Opening) -> None:
        self._folder = Path(opening.into or opening.run / "tensorboard")
        self._sent = opening.sent
        self._writers: dict[str, SummaryWriter] = {}

    @property
    def place(self) -> str:
        """The folder and the command."""
        return f"TensorBoard: look with tensorboard --logdir {self._folder}"

    def last(self, point: Point) -> int:
        """What is noted, if the files are there.

        Events beyond it, of a process that was killed, are declared void by the next file.
        """
        there = (self._folder / point.stage / point.split).is_dir()
        return self._sent.get(point.stream, -1) if there else -1

    def send(self, points: Sequence[Point]) -> None:
        """Write and flush."""
        for point in points:
            writer = self._writer(point)
            for name, value in point.values.items():
                writer.add_scalar(name, value, point.step)
        for writer in self._writers.values():
            writer.flush()

    def _writer(self, point: Point) -> SummaryWriter:
        if point.stream not in self._writers:
            self._writers[point.stream] = SummaryWriter(
                str(self._folder / point.stage / point.split),
                purge_step=self._sent.get(point.stream, -1) + 1,
            )
        return self._writers[point.stream]

    def close(self, *, finished: bool) -> None:
        """Close the files."""
        for writer in self._writers.values():
            writer.close()
