"""A cache that is being filled survives kills, failing disks and power loss."""

from __future__ import annotations

import errno
import mmap
import os
import random
import shutil
import signal
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors import safe_open

from attar.runtime import lock
from attar.teachers.store import Field, Store

FIELDS = [Field("logits", "float32", (9,)), Field("content", "int64", ())]
SLOTS, BATCH = 12_000, 60
DEEP = 10 if os.environ.get("ATTAR_DEEP") else 1


def answers(slots: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
    grown = slots.reshape(-1, 1) * 2 + np.arange(9) / 4
    return {"logits": grown.astype(np.float32), "content": slots * (1 << 33)}


def opened(folder: Path, writer: str | None = None, *, slots: int = SLOTS) -> Store:
    return Store(folder, slots=slots, fields=FIELDS, writer=writer, shard_bytes=52 * 500)


def known(store: Store, slots: int = SLOTS) -> set[int]:
    """The slots that have a row; each is the right one, to the bit."""
    there = np.flatnonzero(store.known(np.arange(slots)))
    assert store.filled == len(there)
    wanted, found = answers(there), store.take(there)
    assert all(found[name].tobytes() == array.tobytes() for name, array in wanted.items())
    return {int(slot) for slot in there}


def is_tidy(folder: Path) -> bool:
    """Nothing but sealed shards, their lists and the locks."""
    return all(path.suffix in (".safetensors", ".json", ".lock") for path in folder.iterdir())


# Killed


class Board:
    """Memory that children share with their parent: a byte a batch, 1 when it is committed."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, SLOTS // BATCH + 2)

    def begun(self, child: int) -> bool:
        return self.memory[-1 - child] == 1

    def committed(self) -> set[int]:
        rows = np.frombuffer(self.memory, np.uint8, SLOTS // BATCH).repeat(BATCH)
        return {int(slot) for slot in np.flatnonzero(rows)}


def fill(folder: Path, board: Board, child: int, seed: int) -> None:
    """What a life does: batches in an order of its own, of which each child has its half."""
    order = np.random.default_rng(seed).permutation(SLOTS // BATCH)
    with opened(folder, f"writer{child}") as store:
        board.memory[-1 - child] = 1
        for number in order[order % 2 == child]:
            slots = np.arange(number * BATCH, (number + 1) * BATCH)
            if not store.known(slots).all():
                store.add(slots, answers(slots))
            board.memory[int(number)] = 1


def forked(work: Callable[[], None]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def ended(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_killed_at_any_time_a_cache_has_all_that_was_committed(place: Path) -> None:
    """Two writers at once; one life after the other, until the cache is full, and again."""
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    kills, cut, runs, usual = 0, 0, 0, 0.0
    while kills < 120 * DEEP or runs < 2:
        folder, board, life = place / f"run-{runs}", Board(), 0
        while True:
            begun = time.monotonic()
            for each in (0, 1):
                board.memory[-1 - each] = 0
            pids = [forked(partial(fill, folder, board, each, runs)) for each in (0, 1)]
            codes = []
            while not all(board.begun(each) for each in (0, 1)):
                time.sleep(0.0005)
                assert time.monotonic() - begun < 60, "a life does not begin"
            for pid in pids:
                if kills < 120 * DEEP or runs < 1:
                    time.sleep(chance.uniform(0, max(0.01, usual / 8)))
                    os.kill(pid, signal.SIGKILL)
                codes.append(ended(pid))
            assert set(codes) <= {0, -signal.SIGKILL}, codes
            kills += codes.count(-signal.SIGKILL)
            life += 1
            with opened(folder) as reader:
                there = known(reader)
                assert reader.verify() == []
            committed = board.committed()
            assert committed <= there
            assert len(there - committed) <= 2 * BATCH
            cut += not is_tidy(folder)
            if codes == [0, 0]:
                usual = usual or time.monotonic() - begun
                break
        assert there == set(range(SLOTS))
        assert is_tidy(folder)
        runs += 1
        for path in folder.glob("*.safetensors"):
            with safe_open(path, "np") as file:
                assert file.get_tensor("content").tolist() == [
                    int(slot) << 33 for slot in file.get_tensor("slots")
                ]
        shutil.rmtree(folder)
    assert cut > 40, "the kills fell beside the writing"


# Every call that fails


@pytest.fixture
def cut(place: Path) -> Callable[[], Path]:
    """A fresh copy, at each call, of a cache of which 64 rows are sealed and 40 are not."""
    store = Store(place / "live", slots=200, fields=FIELDS, writer="w", shard_bytes=1)
    for start in range(0, 104, 26):
        add(store, start, start + 26)
    assert [shard["rows"] for shard in store.shards()] == [64]
    shutil.copytree(place / "live", place / "before")
    store.close()

    def copy() -> Path:
        shutil.rmtree(place / "twin", ignore_errors=True)
        return Path(shutil.copytree(place / "before", place / "twin"))

    return copy


def add(store: Store, start: int, stop: int) -> None:
    slots = np.arange(start, stop, dtype=np.int64)
    store.add(slots, answers(slots))


def fill_further(folder: Path, done: set[int]) -> None:
    """Go on in a part that was left, over the ends of two shards; *done* is what is committed.

    A batch that failed is tried once more, as a disk may have been emptied meanwhile.
    """
    with Store(folder, slots=200, fields=FIELDS, writer="w", shard_bytes=1) as store:
        for start in range(104, 200, 32):
            try:
                add(store, start, start + 32)
            except OSError:
                add(store, start, start + 32)
            done |= set(range(start, start + 32))


def die(failing: Any) -> None:
    """What the kernel does for a dead process: files are closed, the lock is given back."""
    held = set(failing._paths)
    failing.close_all()
    lock._held.difference_update(held)


def recovered(folder: Path, done: set[int]) -> None:
    """What was committed is there and right, and all is sound."""
    with Store(folder, slots=200, fields=FIELDS) as store:
        assert known(store, 200) >= done
        assert store.verify() == []


def complete(folder: Path) -> None:
    """What is missing is added; then nothing is left over."""
    fill_further(folder, set())
    with Store(folder, slots=200, fields=FIELDS, writer="w") as store:
        add(store, 0, 200)
    with Store(folder, slots=200, fields=FIELDS) as store:
        assert known(store, 200) == set(range(200))
        assert store.verify() == []
        assert sum(shard["rows"] for shard in store.shards()) >= 200
    assert is_tidy(folder), sorted(os.listdir(folder))


@pytest.mark.usefixtures("unsynced")
def test_a_fault_at_every_call_loses_nothing_that_was_committed(
    cut: Callable[[], Path], place: Path, disk: Any, killed: type[BaseException],
    monkeypatch: pytest.MonkeyPatch, fault: tuple[int | str, bool],
) -> None:  # fmt: skip
    for at in range(1, 10_000):
        folder, done = cut(), set(range(104))
        failing = disk(place)
        failing.arm(at, fault[0], stuck=fault[1])
        error: BaseException | None = None
        with monkeypatch.context() as patch:
            failing.install(patch)
            try:
                fill_further(folder, done)
            except (OSError, killed) as raised:
                error = raised
        die(failing)
        if isinstance(error, OSError):
            assert str(place) in str(error), failing.calls[-1]
            assert os.strerror(error.errno) in str(error), failing.calls[-1]
        if error is None:
            assert done == set(range(200))
            # What could not be removed once sealed is, at the latest, when the next one comes.
            assert is_tidy(folder) or failing.hit
        recovered(folder, done)
        if fault[0] == "kill" or at % 4 == 0 or DEEP > 1:
            complete(folder)
        if not failing.hit:
            break
    assert at > 100


@pytest.mark.usefixtures("unsynced")
def test_power_lost_at_every_call_leaves_nothing_wrong(
    cut: Callable[[], Path], place: Path, disk: Any, killed: type[BaseException],
    monkeypatch: pytest.MonkeyPatch, rng: random.Random,
) -> None:  # fmt: skip
    """Rows that were not synced may be gone; none is wrong, and what was sealed before stays."""
    lost = 0
    for at in range(1, 10_000):
        for everything in (True, False):
            folder, done = cut(), set(range(104))
            failing = disk(place)
            failing.arm(at, "kill")
            with monkeypatch.context() as patch:
                failing.install(patch)
                with suppress(killed):
                    fill_further(folder, done)
            die(failing)
            unsynced = failing.unsynced
            failing.lose_power(
                unsynced if everything else rng.randrange(unsynced + 1), None if everything else rng
            )
            with Store(folder, slots=200, fields=FIELDS) as store:
                there = known(store, 200)
                assert there >= set(range(104)), failing.calls[-1]
                lost += len(done - there)
            complete(folder)
        if not failing.hit:
            break
    assert at > 100
    assert lost > 0


@pytest.mark.usefixtures("unsynced")
def test_what_could_not_be_synced_is_written_anew(
    place: Path, disk: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second fsync that succeeds says nothing about what the first one lost."""
    folder = place / "cache"
    store = Store(folder, slots=200, fields=FIELDS, writer="w", shard_bytes=1)
    add(store, 0, 64)
    before = (folder / "w-000000.part").stat().st_ino
    fails = iter([OSError(errno.EIO, os.strerror(errno.EIO))])

    def once(descriptor: int) -> None:
        for error in fails:
            raise error

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", once)
        with pytest.raises(OSError, match=r"Input/output error.*w-000000\.part"):
            store._writer.finish()  # type: ignore[union-attr]
    store.close()
    assert (folder / "w-000000.safetensors").stat().st_ino != before
    with Store(folder, slots=200, fields=FIELDS) as reader:
        assert known(reader, 200) == set(range(64))


def test_rows_that_a_reader_may_have_seen_are_not_written_over(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk may say that a line failed, and have it all the same."""
    store = Store(place / "cache", slots=200, fields=FIELDS, writer="w", shard_bytes=1)
    add(store, 0, 10)
    pwrite = os.pwrite

    def lying(descriptor: int, data: Any, place: int) -> int:
        count = pwrite(descriptor, data, place)
        if len(data) == 44:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return count

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", lying)
        with pytest.raises(OSError, match=r"w-000000\.log"):
            add(store, 10, 30)
    with Store(place / "cache", slots=200, fields=FIELDS) as reader:
        assert known(reader, 200) == set(range(30))
        add(store, 40, 70)
        assert known(reader, 200) == set(range(30))
        reader.refresh()
        add(store, 0, 200)
        reader.refresh()
        assert known(reader, 200) == set(range(200))
    store.close()
    with Store(place / "cache", slots=200, fields=FIELDS) as reader:
        assert known(reader, 200) == set(range(200))
        assert reader.verify() == []


def test_a_shard_that_is_not_listed_yet_is_read_by_its_log(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(place / "cache", slots=200, fields=FIELDS, writer="w", shard_bytes=1)
    add(store, 0, 64)

    def failing(path: Path, data: bytes) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    with monkeypatch.context() as patch:
        patch.setattr("attar.teachers.part.write_atomic", failing)
        with pytest.raises(OSError, match=r"w\.json"):
            store.close()
    assert sorted(path.suffix for path in (place / "cache").glob("w*")) == [".log", ".safetensors"]
    with Store(place / "cache", slots=200, fields=FIELDS) as reader:
        assert known(reader, 200) == set(range(64))
        assert reader.verify() == []
    with Store(place / "cache", slots=200, fields=FIELDS, writer="w") as store:
        add(store, 0, 100)
    assert is_tidy(place / "cache")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Of one mebibyte."""
    mount = tmp_path / "small"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mount)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no small disk can be mounted here")
    yield mount
    subprocess.run(["umount", "--lazy", str(mount)], check=False, capture_output=True)


def test_a_full_disk_keeps_what_was_committed_and_goes_on_when_there_is_room(
    small_disk: Path,
) -> None:
    folder, fields = small_disk / "cache", [Field("x", "float32", (256,))]
    (small_disk / "other").write_bytes(bytes(600 << 10))
    rows = np.arange(100 * 256, dtype=np.float32).reshape(100, 256)
    store = Store(folder, slots=2_000, fields=fields, writer="w", shard_bytes=1 << 18)
    done = 0
    raised: OSError | None = None
    while raised is None:
        try:
            store.add(np.arange(done, done + 100), {"x": rows + done})
            done += 100
        except OSError as error:
            raised = error
    assert raised.errno == errno.ENOSPC
    assert str(folder / "w-00000") in str(raised)
    assert done >= 200
    with pytest.raises(OSError, match="No space left"):
        store.close()
    with Store(folder, slots=2_000, fields=fields) as reader:
        assert reader.filled >= done
        assert reader.verify() == []
        for start in range(0, done, 100):
            assert (reader.take(np.arange(start, start + 100))["x"] == rows + start).all()
    (small_disk / "other").unlink()
    with Store(folder, slots=2_000, fields=fields, writer="w", shard_bytes=1 << 18) as store:
        store.add(np.arange(done, done + 100), {"x": rows + done})
    with Store(folder, slots=2_000, fields=fields) as reader:
        assert reader.filled == done + 100
        assert reader.verify() == []


# Two at once


def test_two_writers_may_make_the_folder_at_once(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mkdir = os.mkdir

    def beaten(path: Path, mode: int = 0o777) -> None:
        mkdir(path, mode)
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))

    monkeypatch.setattr(os, "mkdir", beaten)
    with opened(place / "new" / "cache", "w") as store:
        add(store, 0, 10)
    (place / "file").write_bytes(b"")
    with pytest.raises(FileExistsError):
        opened(place / "file", "w")


def test_a_name_is_held_while_its_process_lives_and_no_longer(place: Path) -> None:
    heard, ready = os.pipe()

    def hold() -> None:
        with opened(place / "cache", "w") as store:
            add(store, 0, 10)
            os.write(ready, b"x")
            time.sleep(60)

    pid = forked(hold)
    assert os.read(heard, 1) == b"x"
    with opened(place / "cache", "w") as store:
        assert known(store) == set(range(10))
        with pytest.raises(ValueError, match=rf"process {pid} writes here as 'w'.* under another"):
            add(store, 10, 20)
        os.kill(pid, signal.SIGKILL)
        assert ended(pid) == -signal.SIGKILL
        add(store, 10, 20)
        assert known(store) == set(range(20))
    assert is_tidy(place / "cache")
    os.close(heard)
    os.close(ready)
