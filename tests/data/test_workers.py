"""Processes that read ahead: the same bytes, the same errors, and none left behind."""

from __future__ import annotations

import gc
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from itertools import islice

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from attar.data import DatasetSource, Source, Subset, crop, cutmix, flip, mixup, split
from attar.runtime import DataError, UsageError

pytestmark = pytest.mark.filterwarnings("error")

EVERYTHING = (crop, flip, mixup, cutmix)
INPUTS = torch.rand(30, 1, 6, 5, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(30) % 3
counts = pytest.mark.parametrize("workers", [1, 2, 4])


class Items:
    """A data set that can read who reads it, and fail."""

    def __init__(self, fault: Exception | None = None, at: int = 17) -> None:
        self.fault = fault
        self.at = at

    def __len__(self) -> int:
        return len(INPUTS)

    def __getitem__(self, index: int):
        if self.fault is not None and index == self.at:
            raise self.fault
        return INPUTS[index], int(LABELS[index])


class Readers(Source):
    """Each row holds the number of the process that read it."""

    name = "readers"
    classes = None
    shape = (1,)
    labels = None

    def __len__(self) -> int:
        return 12

    def rows(self, ids):
        return {"inputs": torch.full((len(ids), 1), os.getpid(), dtype=torch.float64), "ids": ids}


def _source(workers: int) -> DatasetSource:
    return DatasetSource(Items(), classes=3, workers=workers)


def _readers(batches) -> set[int]:
    return {int(reader) for batch in batches for reader in batch["inputs"].flatten()}


def _same(left, right) -> None:
    for one, other in zip(left, right, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            assert one[key].dtype == other[key].dtype
            assert torch.equal(one[key], other[key])


@counts
@pytest.mark.parametrize("augment", [(), EVERYTHING], ids=["plain", "augmented"])
def test_epochs_are_equal_to_the_bit(workers: int, augment) -> None:
    for number, start, part in ((0, 0, (0, 1)), (3, 2, (0, 1)), (1, 0, (1, 5))):
        call = {"batch_size": 7, "seed": 4, "augment": augment, "start": start, "part": part}
        _same(_source(workers).epoch(number, **call), _source(0).epoch(number, **call))


@counts
def test_batches_are_equal_to_the_bit(workers: int) -> None:
    _same(_source(workers).batches(8), _source(0).batches(8))
    _same(_source(workers).batches(8, (2, 3)), _source(0).batches(8, (2, 3)))


def test_other_processes_read() -> None:
    source = Readers()
    assert _readers(source.epoch(0, batch_size=2, seed=0)) == {os.getpid()}
    source.workers = 2
    for batches in (source.epoch(0, batch_size=2, seed=0), source.batches(2)):
        readers = _readers(batches)
        assert len(readers) == 2
        assert os.getpid() not in readers


def test_no_more_processes_start_than_there_are_batches() -> None:
    source = Readers()
    source.workers = 4
    batches = source.batches(12)
    next(batches)
    assert len(multiprocessing.active_children()) == 1
    assert list(source.epoch(0, batch_size=4, seed=0, start=3)) == []


def test_subsets_and_splits_read_by_the_workers_of_their_source() -> None:
    source = Readers()
    source.workers = 2
    rest, part = split(source, 0.5)
    nested = Subset(rest, torch.tensor([0, 3, 1, 5]))
    for own in (rest, part, nested):
        readers = _readers(own.epoch(0, batch_size=2, seed=0))
        assert len(readers) == 2
        assert os.getpid() not in readers
    ids = torch.tensor([20, 3, 29, 14, 8])
    ahead, here = (Subset(_source(workers), ids) for workers in (2, 0))
    call = {"batch_size": 2, "seed": 0, "augment": EVERYTHING}
    _same(ahead.epoch(0, **call), here.epoch(0, **call))


def test_labels_that_are_not_listed_are_read_by_the_workers() -> None:
    assert torch.equal(_source(2).labels, LABELS)


@counts
def test_global_random_states_are_left_alone(workers: int) -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    list(_source(workers).epoch(0, batch_size=7, seed=0, augment=EVERYTHING))
    list(_source(workers).batches(8))
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])
    assert before[2] == random.getstate()


def test_a_data_set_that_draws_does_not_draw_the_same_every_epoch() -> None:
    class Drawing(Items):
        def __getitem__(self, index):
            return torch.rand(4), 0

    source = DatasetSource(Drawing(), workers=1)
    first, again, second = (
        next(source.epoch(number, batch_size=5, seed=0))["inputs"] for number in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


def test_batches_can_be_kept_without_keeping_files_open() -> None:
    folder = "/proc/self/fd"
    if not os.path.isdir(folder):
        pytest.skip("this platform does not list the files a process has open")
    before = len(os.listdir(folder))
    kept = list(_source(1).epoch(0, batch_size=1, seed=0))
    assert len(kept) == 30
    assert len(os.listdir(folder)) < before + 10


# Errors


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (OSError("no such\nimage"), r"OSError: no such image"),
        (KeyError("x"), r"KeyError: 'x'"),
        (RuntimeError("half\nread"), r"RuntimeError: half read"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_item_that_cannot_be_read_is_one_sentence(workers: int, fault, reason: str) -> None:
    source = DatasetSource(Items(fault), classes=3, name="mine", workers=workers)
    with pytest.raises(DataError) as error:
        list(source.batches(4))
    expected = f"mine: item 17 cannot be read ({reason}); repair it or leave it out"
    assert str(error.value) == expected
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_of_ours_comes_as_it_is(workers: int) -> None:
    source = DatasetSource(Items(DataError("mine: broken"), at=3), workers=workers)
    with pytest.raises(DataError, match=r"^mine: broken$"):
        list(source.batches(2))
    with pytest.raises(UsageError, match=r"^crop: pixels must be from 1 to 4"):
        list(
            _source(workers).epoch(
                0, batch_size=4, seed=0, augment=(lambda b, d: crop(b, d, pixels=9),)
            )
        )


def test_batches_before_the_fault_are_given() -> None:
    batches = DatasetSource(Items(OSError("x")), classes=3, workers=2).batches(4)
    assert torch.cat([batch["ids"] for batch in islice(batches, 4)]).tolist() == list(range(16))
    with pytest.raises(DataError, match="item 17"):
        next(batches)


def test_an_augmentation_that_fails_shows_where() -> None:
    def broken(batch, draw):
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match=r"(?s)in broken.*ZeroDivisionError: mine"):
        list(_source(1).epoch(0, batch_size=4, seed=0, augment=(broken,)))


def test_a_process_that_dies_is_one_sentence() -> None:
    class Deadly(Items):
        def __getitem__(self, index):
            if index == 9:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__getitem__(index)

    with pytest.raises(DataError, match=r"^Deadly: a process that reads rows has died, .*=0$"):
        list(DatasetSource(Deadly(), workers=2).batches(4))
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("workers", [-1, 1.5, "2", None], ids=str)
def test_impossible_numbers_of_workers_are_refused(workers) -> None:
    with pytest.raises(UsageError, match=f"workers must be an integer .* 0, not {workers}"):
        DatasetSource(Items(), workers=workers)


@pytest.fixture
def spawned():
    """Processes start as they do where the platform cannot fork."""
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method("spawn", force=True)
    yield
    multiprocessing.set_start_method(before, force=True)


@pytest.mark.usefixtures("spawned")
def test_what_cannot_be_sent_to_a_process_is_one_sentence() -> None:
    source = DatasetSource(TensorDataset(INPUTS, LABELS), classes=3, name="mine", workers=2)
    with pytest.raises(UsageError, match=r"^mine: cannot be sent to other processes \(.*lambda"):
        list(source.epoch(0, batch_size=4, seed=0, augment=(lambda batch, draw: batch,)))
    gc.collect()
    assert not multiprocessing.active_children()


@pytest.mark.usefixtures("spawned")
def test_spawned_processes_give_the_same() -> None:
    ahead, here = (
        DatasetSource(TensorDataset(INPUTS, LABELS), classes=3, workers=workers)
        for workers in (1, 0)
    )
    call = {"batch_size": 8, "seed": 0, "augment": EVERYTHING}
    _same(ahead.epoch(0, **call), here.epoch(0, **call))


# No process is left behind


@counts
def test_a_dropped_epoch_ends_its_processes(workers: int) -> None:
    batches = _source(workers).epoch(0, batch_size=3, seed=0)
    next(batches)
    assert len(multiprocessing.active_children()) == workers
    del batches
    gc.collect()
    assert not multiprocessing.active_children()


def test_a_finished_epoch_has_ended_its_processes() -> None:
    batches = _source(2).epoch(0, batch_size=3, seed=0)
    list(batches)
    assert not multiprocessing.active_children()


MAIN = """
import multiprocessing, signal, sys, time
from attar.data import DatasetSource

class Items(list):
    def __getitem__(self, index):
        time.sleep(0.1 if sys.argv[1] == "SIGINT" else 0)
        return super().__getitem__(index)

told = []
batches = DatasetSource(Items([0.0] * 400), workers=2).batches(1)
next(batches)
if sys.argv[1] == "SIGTERM":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: told.append(1))
print(*[child.pid for child in multiprocessing.active_children()], flush=True)
while not told:
    next(batches) if sys.argv[1] == "SIGINT" else time.sleep(0.01)
for _ in range(300):
    next(batches)
print("stopped in good order", flush=True)
raise SystemExit(9)
"""


@pytest.fixture
def main(request):
    process = subprocess.Popen(
        [sys.executable, "-c", MAIN, request.param],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    yield process
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def _gone(pid: int) -> bool:
    """Ended, though nobody may have asked after it yet."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def _wait_until_gone(pids: list[int]) -> None:
    end = time.monotonic() + 60
    while not all(map(_gone, pids)):
        assert time.monotonic() < end, "a process was left behind"
        time.sleep(0.05)


linux = pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="reads /proc")


@linux
@pytest.mark.parametrize("main", ["SIGINT"], indirect=True)
def test_an_interrupt_from_the_keyboard_is_told_once(main) -> None:
    pids = [int(pid) for pid in main.stdout.readline().split()]
    os.killpg(main.pid, signal.SIGINT)
    _, errors = main.communicate(timeout=25)  # less than the processes would wait for it
    assert len(pids) == 2
    assert errors.count("Traceback") == errors.count("KeyboardInterrupt") == 1
    assert "Process" not in errors
    _wait_until_gone(pids)


@linux
@pytest.mark.parametrize("main", ["SIGTERM"], indirect=True)
def test_told_to_end_the_processes_read_on_until_the_main_one_stops(main) -> None:
    pids = [int(pid) for pid in main.stdout.readline().split()]
    os.killpg(main.pid, signal.SIGINT)
    os.killpg(main.pid, signal.SIGTERM)
    told, errors = main.communicate(timeout=25)  # less than the processes would wait for it
    assert (told, errors, main.returncode) == ("stopped in good order\n", "", 9)
    _wait_until_gone(pids)


@linux
@pytest.mark.parametrize("main", ["SIGKILL"], indirect=True)
def test_a_killed_main_process_leaves_none(main) -> None:
    pids = [int(pid) for pid in main.stdout.readline().split()]
    os.kill(main.pid, signal.SIGKILL)
    _wait_until_gone(pids)
