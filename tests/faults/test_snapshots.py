"""A checkpoint is whole or absent: after crashes, full disks, power loss and flipped bits."""

from __future__ import annotations

import errno
import math
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from attar.runtime import DataError, RunExistsError, UsageError
from attar.runtime.lock import Lock
from attar.runtime.snapshot_format import Manifest, sealed, unsealed
from attar.runtime.snapshots import Snapshot, Snapshots

Parts = dict[str, dict[str, Tensor]]
LOADABLE = [
    "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8",
    "uint16", "uint32", "uint64", "bool", "complex64", "float8_e4m3fn", "float8_e5m2",
]  # fmt: skip


def content(number: int) -> tuple[Parts, dict[str, Any]]:
    """A small checkpoint, another one for each number."""
    parts = {
        "objective": {"w": torch.full((3, 4), float(number)), "n": torch.tensor(number)},
        "optimizer": {"m": torch.arange(5) + number},
    }
    return parts, {"number": number, "loss": 0.1 * number}


def put(store: Snapshots, step: int, number: int | None = None) -> Path:
    return store.save(step, *content(step if number is None else number))


def number_of(snapshot: Snapshot | None) -> int | None:
    """Which content was read; every value of it is compared."""
    if snapshot is None:
        return None
    number = snapshot.facts["number"]
    assert isinstance(number, int)
    parts, facts = content(number)
    assert snapshot.facts == facts
    assert snapshot.parts.keys() == parts.keys()
    for part, tensors in parts.items():
        assert snapshot.parts[part].keys() == tensors.keys()
        assert all(torch.equal(snapshot.parts[part][name], t) for name, t in tensors.items())
    return number


def steps_in(folder: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in folder.glob("step-*"))


def bits(tensor: Tensor) -> bytes:
    return bytes(tensor.resolve_conj().contiguous().reshape(-1).view(torch.uint8).tolist())


@pytest.fixture
def store(place: Path) -> Snapshots:
    """Two checkpoints, of steps 1 and 2."""
    made = Snapshots(place / "run" / "checkpoints")
    put(made, 1)
    put(made, 2)
    return made


@pytest.fixture
def twin(store: Snapshots, place: Path) -> Callable[[], Path]:
    """A fresh copy of the store's folder at each call."""

    def copy() -> Path:
        target = place / "twin"
        shutil.rmtree(target, ignore_errors=True)
        return Path(shutil.copytree(store.folder, target, copy_function=os.link))

    return copy


# What is saved comes back


@pytest.mark.parametrize("dtype", LOADABLE)
def test_every_type_comes_back_to_the_bit(tmp_path: Path, dtype: str) -> None:
    kind = getattr(torch, dtype)
    raw = torch.arange(64, dtype=torch.uint8) % (2 if kind == torch.bool else 251)
    value = raw.view(kind)
    snapshots = Snapshots(tmp_path)
    snapshots.save(0, {"x": {"v": value, "0d": value[0], "none": value[:0]}}, {})
    found = snapshots.latest()
    assert found is not None
    for name, tensor in {"v": value, "0d": value[0], "none": value[:0]}.items():
        got = found.parts["x"][name]
        assert (got.dtype, got.shape, bits(got)) == (tensor.dtype, tensor.shape, bits(tensor))


def test_views_ties_and_odd_tensors_come_back_equal(tmp_path: Path) -> None:
    base = torch.randn(4, 6)
    value = torch.tensor([1 + 2j, 3 - 4j], dtype=torch.complex64)
    tensors = {
        "base": base, "tied": base, "transposed": base.t(), "row": base[1], "overlap": base[1:3],
        "inner": base.view(-1)[7:9], "far": base.view(-1)[20:24], "none": base[1:1],
        "spread": torch.tensor([1.0]).expand(5), "conjugate": value.conj(), "half": value.imag,
        "minus": value.conj().imag, "grad": torch.nn.Parameter(torch.ones(2)),
        "last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "nan": torch.tensor([math.nan, math.inf, -0.0]), "rng": torch.get_rng_state(),
        "ünïcode.name/with space": torch.zeros(()), "": torch.ones(1),
    }  # fmt: skip
    snapshots = Snapshots(tmp_path)
    folder = snapshots.save(7, {"odd": tensors, "nothing": {}, "facts": {"t": base}}, {})
    found = snapshots.latest()
    assert found is not None
    assert (found.step, found.folder, found.parts["nothing"]) == (7, folder, {})
    assert list(found.parts["odd"]) == sorted(tensors)
    for name, tensor in tensors.items():
        expected = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())
        assert bits(found.parts["odd"][name]) == bits(expected), name
        assert found.parts["odd"][name].shape == tensor.shape


def test_what_is_read_can_be_changed_without_changing_the_file(tmp_path: Path) -> None:
    snapshots = Snapshots(tmp_path)
    put(snapshots, 1)
    found = snapshots.latest()
    assert found is not None
    found.parts["objective"]["w"].add_(1)
    assert number_of(snapshots.latest()) == 1


def test_facts_come_back_to_the_bit(tmp_path: Path) -> None:
    floats = [0.1, 5e-324, -0.0, 1e308, math.pi, float("inf"), float("-inf")]
    facts = {
        "f": floats,
        "i": [2**200, -(2**63)],
        "b": [True, None],
        "s": "ü\ud800\n",
        "d": {"": {}},
    }
    snapshots = Snapshots(tmp_path)
    snapshots.save(0, {}, {**facts, "nan": math.nan})
    found = snapshots.latest()
    assert found is not None
    assert math.isnan(found.facts.pop("nan"))
    assert found.facts == facts
    assert [x.hex() for x in found.facts["f"]] == [x.hex() for x in floats]
    assert type(found.facts["b"][0]) is bool
    assert found.parts == {}


def deep(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("step", "parts", "facts", "says"),
    [
        (-1, {}, {}, "step is -1"),
        (True, {}, {}, "step is True"),
        (1.0, {}, {}, "step is 1.0"),
        (10**18, {}, {}, "step is 10"),
        (0, {"../up": {}}, {}, "part '../up'"),
        (0, {"Up": {}}, {}, "part 'Up'"),
        (0, {"": {}}, {}, "part ''"),
        (0, {"a\n": {}}, {}, "no name of a part"),
        (0, {"a" * 65: {}}, {}, "no name of a part"),
        (0, {"x": {"__metadata__": torch.ones(1)}}, {}, "no room for this name"),
        (0, {"x": {"\ud800": torch.ones(1)}}, {}, "no room for this name"),
        (0, {"x": {"t": 3}}, {}, "is a int, not a tensor"),
        (0, {"x": {"t": torch.eye(2).to_sparse()}}, {}, "sparse or meta"),
        (0, {"x": {"t": torch.ones(2, device="meta")}}, {}, "sparse or meta"),
        (0, {"x": {"t": torch.ones(2, dtype=torch.complex128)}}, {}, "complex128"),
        (0, {"x": {"t": torch.ones(2, dtype=torch.uint8).view(torch.float8_e8m0fnu)}}, {}, "e8m0"),
        (0, {}, {"a": (1, 2)}, r"facts\['a'\] is a tuple"),
        (0, {}, {"a": [{"b": {1}}]}, r"facts\['a'\]\[0\]\['b'\] is a set"),
        (0, {}, {"a": torch.ones(1)}, "is a Tensor"),
        (0, {}, {"a": {1: 2}}, "has the key 1"),
        (0, {}, {"a": deep(70)}, "levels deep"),
        (0, {}, {"a": 10**5000}, "cannot be written"),
    ],
)  # fmt: skip
def test_what_could_not_be_read_back_is_refused_before_anything_is_written(
    tmp_path: Path, step: Any, parts: Any, facts: Any, says: str
) -> None:
    with pytest.raises(UsageError, match=says):
        Snapshots(tmp_path / "new").save(step, parts, facts)
    assert not (tmp_path / "new").exists()


def test_one_checkpoint_is_too_few_to_keep(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="keep is 1"):
        Snapshots(tmp_path, keep=1)


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert Snapshots(tmp_path / "absent").latest() is None
    assert not (tmp_path / "absent").exists()
    (tmp_path / "step-000000001.tmp-0").mkdir()
    (tmp_path / "step-1").mkdir()
    (tmp_path / "step-0000000001").mkdir()
    assert Snapshots(tmp_path).latest() is None


def test_the_newest_are_kept_and_named(tmp_path: Path) -> None:
    snapshots = Snapshots(tmp_path, keep=3)
    for step in (9, 10, 99, 100, 1_000_000_000, 1_000_000_001):
        put(snapshots, step)
    kept = ["step-000000100", "step-1000000000", "step-1000000001"]
    assert sorted(os.listdir(tmp_path)) == ["LATEST", *kept]
    assert (tmp_path / "LATEST").read_text() == "step-1000000001\n"
    assert number_of(Snapshots(tmp_path).latest()) == 1_000_000_001


def test_a_damaged_one_does_not_count_as_kept(store: Snapshots) -> None:
    put(store, 3)
    victim = store.folder / "step-000000003" / "facts.json"
    victim.write_bytes(victim.read_bytes().replace(b"3", b"4"))
    put(Snapshots(store.folder), 4)
    assert steps_in(store.folder) == [2, 3, 4]
    assert (number_of(store.latest()), put(store, 5).name) == (4, "step-000000005")
    assert steps_in(store.folder) == [4, 5]


def test_the_one_just_saved_is_kept_even_behind_newer_ones(store: Snapshots) -> None:
    folder = put(store, 0)
    assert folder.is_dir()
    assert number_of(store.latest()) == 2


def test_the_same_step_again_is_kept_or_replaced(store: Snapshots) -> None:
    folder = store.folder / "step-000000002"
    before = folder.stat().st_ino
    assert put(store, 2) == folder
    assert folder.stat().st_ino == before
    assert put(store, 2, 5) == folder
    assert number_of(store.latest()) == 5
    (folder / "facts.json").write_bytes(b"{}")
    put(store, 2, 5)
    assert number_of(store.latest()) == 5
    assert sorted(os.listdir(store.folder)) == ["LATEST", "step-000000001", "step-000000002"]


# Damage is refused, named, and the one before is taken


def fall_back(folder: Path, named: str) -> None:
    """The damaged step 2 in *folder* is refused for *named*, and step 1 is read."""
    told: list[str] = []
    assert number_of(Snapshots(folder).latest(tell=told.append)) == 1
    assert len(told) == 1
    assert told[0].startswith(f"checkpoint {folder / 'step-000000002'} is damaged: {named}")
    assert told[0].endswith("; going on from the one before")


def test_a_thousand_flipped_bits_are_refused(store: Snapshots, rng: random.Random) -> None:
    files = sorted((store.folder / "step-000000002").iterdir())
    assert len(files) == 4
    for _ in range(1000):
        path = rng.choice(files)
        whole = path.read_bytes()
        at = rng.randrange(len(whole) * 8)
        flipped = bytearray(whole)
        flipped[at // 8] ^= 1 << at % 8
        path.write_bytes(flipped)
        fall_back(store.folder, f"{path.name} has another SHA-256 than")
        path.write_bytes(whole)
    assert number_of(store.latest()) == 2


def test_every_bit_of_a_manifest_counts(store: Snapshots) -> None:
    whole = (store.folder / "step-000000002" / "manifest.json").read_bytes()
    unsealed(whole, store.folder)
    for at in range(len(whole) * 8):
        flipped = bytearray(whole)
        flipped[at // 8] ^= 1 << at % 8
        with pytest.raises(DataError, match="another SHA-256"):
            unsealed(bytes(flipped), store.folder)


def test_four_hundred_cut_files_are_refused(store: Snapshots, rng: random.Random) -> None:
    files = sorted((store.folder / "step-000000002").iterdir())
    for number in range(400):
        path = files[number % len(files)]
        whole = path.read_bytes()
        path.write_bytes(whole[: rng.randrange(len(whole))])
        fall_back(store.folder, path.name)
        path.write_bytes(whole)
    assert number_of(store.latest()) == 2


@pytest.mark.usefixtures("unsynced")
def test_fifty_files_of_another_step_are_refused(store: Snapshots) -> None:
    one, two = store.folder / "step-000000001", store.folder / "step-000000002"
    for number in range(50):
        put(Snapshots(store.folder), 1, 10 + number)  # another content each time, of equal size
        put(Snapshots(store.folder), 2, 100 + number)
        name = ("facts.json", "objective.safetensors", "optimizer.safetensors", "manifest.json")[
            number % 4
        ]
        shutil.copy(one / name, two / name)
        told: list[str] = []
        assert number_of(store.latest(tell=told.append)) == 10 + number
        assert name in told[0]


def test_a_folder_under_the_name_of_another_step_is_refused(store: Snapshots) -> None:
    shutil.rmtree(store.folder / "step-000000002")
    shutil.copytree(store.folder / "step-000000001", store.folder / "step-000000002")
    fall_back(store.folder, "manifest.json is of step 1")


def spoil_unknown(folder: Path) -> None:
    (folder / "more.safetensors").write_bytes(b"")


def spoil_missing(folder: Path) -> None:
    (folder / "optimizer.safetensors").unlink()


def spoil_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def spoil_link(folder: Path) -> None:
    (folder / "facts.json").rename(folder.parent / "elsewhere")
    (folder / "facts.json").symlink_to(folder.parent / "elsewhere")


def spoil_folder(folder: Path) -> None:
    (folder / "inner").mkdir()


def spoil_linked_folder(folder: Path) -> None:
    folder.rename(folder.parent / "elsewhere")
    folder.symlink_to(folder.parent / "elsewhere")


def spoil_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_bytes(b"")


def spoil_pipe(folder: Path) -> None:
    (folder / "facts.json").unlink()
    os.mkfifo(folder / "facts.json")


def spoil_large_manifest(folder: Path) -> None:
    with (folder / "manifest.json").open("r+b") as file:
        file.truncate(1 << 33)


def spoil_sealed(folder: Path) -> None:
    """A manifest that is sealed as it should be, but names no facts."""
    (folder / "manifest.json").write_bytes(sealed(Manifest(2, ())))


def spoil_size(folder: Path) -> None:
    """A manifest that is sealed as it should be, but asks for more memory than there is."""
    manifest = unsealed((folder / "manifest.json").read_bytes(), folder)
    files = tuple(replace(file, size=1 << 60) for file in manifest.files)
    (folder / "manifest.json").write_bytes(sealed(Manifest(2, files)))


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (spoil_unknown, "more.safetensors is not in its manifest"),
        (spoil_missing, "optimizer.safetensors is missing"),
        (spoil_manifest, "manifest.json cannot be read"),
        (spoil_link, "facts.json is not a plain file"),
        (spoil_folder, "inner is not a plain file"),
        (spoil_linked_folder, "it is not a folder"),
        (spoil_file, "it is not a folder"),
        (spoil_pipe, "facts.json is not a plain file"),
        (spoil_large_manifest, "manifest.json has more than 1048576 bytes"),
        (spoil_sealed, "manifest.json is not a manifest of attar"),
        (spoil_size, "facts.json has 23 bytes and not 1152921504606846976"),
    ],
)
def test_what_does_not_belong_is_refused(
    store: Snapshots, spoil: Callable[[Path], None], named: str
) -> None:
    spoil(store.folder / "step-000000002")
    fall_back(store.folder, named)
    put(Snapshots(store.folder), 3)
    put(Snapshots(store.folder), 4)
    assert number_of(store.latest()) == 4
    assert not (store.folder / "step-000000002").exists()


def test_a_checkpoint_of_a_later_attar_is_neither_skipped_nor_called_damaged(
    store: Snapshots, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("attar.runtime.snapshot_format.SCHEMA", 2)
        put(Snapshots(store.folder), 3)
    with pytest.raises(UsageError, match=r"step-000000003: is of schema 2.* reads 1"):
        store.latest()
    assert steps_in(store.folder) == [1, 2, 3]


def test_when_all_are_damaged_the_folder_is_named(store: Snapshots) -> None:
    for folder in store.folder.glob("step-*"):
        (folder / "facts.json").write_bytes(b"{}")
    told: list[str] = []
    with pytest.raises(DataError, match=rf"{re.escape(str(store.folder))}: none of the 2"):
        store.latest(tell=told.append)
    assert len(told) == 1


def test_a_bad_sector_is_damage_but_a_closed_door_is_not(
    store: Snapshots, disk: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, expected in ((errno.EIO, 1), (errno.EACCES, None)):
        failing = disk(store.folder)
        failing.arm(1, number, only="step-000000002/facts")
        told: list[str] = []
        with monkeypatch.context() as patch:
            failing.install(patch)
            if expected is None:
                with pytest.raises(PermissionError, match="step-000000002/facts"):
                    store.latest(tell=told.append)
            else:
                assert number_of(store.latest(tell=told.append)) == expected
                assert "facts.json cannot be read" in told[0]


# Every call that fails leaves the old one or the new one

SCENES = {  # name: (step saved, number before, number after)
    "first": (1, None, 9),
    "next": (3, 2, 9),
    "again": (2, 2, 9),
    "same": (2, 2, 2),
    "leftovers": (3, 2, 9),
}

READS = ("open", "close", "stat", "lstat", "readv")


def prepare(scene: str, twin: Callable[[], Path], root: Path) -> Path:
    """The folder in which a scene plays."""
    if scene == "first":
        shutil.rmtree(root / "fresh", ignore_errors=True)
        return root / "fresh" / "run" / "checkpoints"
    folder = twin()
    if scene == "leftovers":
        shutil.copytree(folder / "step-000000001", folder / f"step-000000007.tmp-{os.getpid()}")
        shutil.copytree(folder / "step-000000001", folder / "step-000000001.old-1-0")
        (folder / "LATEST.tmp-0").write_bytes(b"")
    return folder


def tidy(folder: Path, scene: str, step: int) -> None:
    """After one fault the draft is gone, and what was set aside is back under its name."""
    name = f"step-{step:09d}"
    if scene == "again":
        assert (folder / name).is_dir()
    else:
        assert not (folder / f"{name}.tmp-{os.getpid()}").exists()


def no_rubbish(folder: Path) -> bool:
    return not [name for name in os.listdir(folder) if ".tmp-" in name or ".old-" in name]


@pytest.mark.usefixtures("unsynced")
@pytest.mark.parametrize("scene", SCENES)
def test_a_fault_at_every_call_leaves_the_old_or_the_new(
    twin: Any, place: Path, disk: Any, killed: type[BaseException],
    monkeypatch: pytest.MonkeyPatch, scene: str, fault: tuple[int | str, bool],
) -> None:  # fmt: skip
    step, before, after = SCENES[scene]
    for at in range(1, 10_000):
        folder = prepare(scene, twin, place)
        failing = disk(place)
        failing.arm(at, fault[0], stuck=fault[1])
        error: BaseException | None = None
        with monkeypatch.context() as patch:
            failing.install(patch)
            try:
                put(Snapshots(folder), step, after)
            except (OSError, killed) as raised:
                error = raised
        failing.close_all()
        if error is not None and not fault[1] and fault[0] != "kill":
            tidy(folder, scene, step)
        told: list[str] = []
        found = number_of(Snapshots(folder).latest(tell=told.append))
        assert found in ((before, after) if error else (after,)), failing.calls[-1]
        assert not told
        if isinstance(error, OSError):
            assert str(place) in str(error), failing.calls[-1]
            assert os.strerror(error.errno) in str(error) or "does not read back" in str(error)
        put(Snapshots(folder), step, after)
        assert number_of(Snapshots(folder).latest()) == after
        assert no_rubbish(folder)
        if not failing.hit:
            assert error is None
            break
        # An older one that cannot be read does not count as kept; the new one is there.
        unread = fault[0] == errno.EIO and failing.calls[-1] in READS
        assert error is not None or unread, failing.calls[-1]
    assert at > 60


@pytest.mark.usefixtures("unsynced")
@pytest.mark.parametrize("scene", SCENES)
def test_power_lost_at_every_call_leaves_the_old_or_the_new(
    twin: Any, place: Path, disk: Any, killed: type[BaseException],
    monkeypatch: pytest.MonkeyPatch, rng: random.Random, scene: str,
) -> None:  # fmt: skip
    step, before, after = SCENES[scene]
    for at in range(1, 10_000):
        for everything in (True, False):
            folder = prepare(scene, twin, place)
            failing = disk(place)
            failing.arm(at, "kill")
            with monkeypatch.context() as patch:
                failing.install(patch)
                with suppress(killed):
                    put(Snapshots(folder), step, after)
            failing.close_all()
            unsynced = failing.unsynced
            failing.lose_power(unsynced if everything else rng.randrange(unsynced + 1))
            told: list[str] = []
            found = number_of(Snapshots(folder).latest(tell=told.append))
            assert found in ((before, after) if failing.hit else (after,)), failing.calls[-1]
            assert not told, failing.calls[-1]
        if not failing.hit:
            break
    assert at > 60


@pytest.mark.usefixtures("unsynced")
def test_killed_at_fifty_places_of_pruning_a_whole_one_is_there(
    store: Snapshots, place: Path, disk: Any, killed: type[BaseException],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    crowd = Snapshots(store.folder, keep=9)
    for step in range(3, 9):
        put(crowd, step)
    for at in range(1, 51):
        folder = place / "twin"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(store.folder, folder, copy_function=os.link)
        failing = disk(folder)
        failing.arm(at, "kill")
        with monkeypatch.context() as patch:
            failing.install(patch)
            with pytest.raises(killed):
                Snapshots(folder)._prune(folder / "step-000000008", 8)
        failing.close_all()
        names = sorted(p.name for p in folder.glob("step-*") if ".tmp-" not in p.name)
        assert names[-2:] == ["step-000000007", "step-000000008"]
        assert number_of(Snapshots(folder).latest()) == 8
        for name in names[:-1]:  # each that still has its name is whole
            shutil.rmtree(folder / names.pop())
            assert number_of(Snapshots(folder).latest()) == int(names[-1][5:]), name


@pytest.mark.parametrize("step", [2, 3])
def test_what_does_not_read_back_is_not_left_in_place(
    store: Snapshots, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    rename = os.rename

    def lying(old: Path, new: Path) -> None:
        rename(old, new)
        if ".tmp-" in old.name:
            (new / "facts.json").write_bytes(b'{"number":9,"loss":0.8}')

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", lying)
        with pytest.raises(OSError, match=r"does not read back \(facts.json.*step-00000000"):
            put(store, step, 8)
    assert steps_in(store.folder) == [1, 2]
    told: list[str] = []
    assert number_of(store.latest(tell=told.append)) == 2
    assert no_rubbish(store.folder)
    assert not told


def test_a_full_disk_keeps_the_old_one(tmp_path: Path) -> None:
    mount = tmp_path / "small"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mount)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no small disk can be mounted here")
    try:
        snapshots = Snapshots(mount / "run")
        put(snapshots, 1)
        large = {"objective": {"w": torch.zeros(400_000)}}
        with pytest.raises(OSError, match=r"No space left.*step-000000002.*safetensors") as raised:
            snapshots.save(2, large, {})
        assert raised.value.errno == errno.ENOSPC
        assert no_rubbish(mount / "run")
        assert number_of(snapshots.latest()) == 1
        put(snapshots, 3)
        assert number_of(snapshots.latest()) == 3
    finally:
        subprocess.run(["umount", str(mount)], check=False, capture_output=True)


# Real processes


def child(work: Callable[[], None]) -> int:
    """Do *work* in a process of its own; its number."""
    pid = os.fork()
    if pid:
        return pid
    try:
        work()
    finally:
        os._exit(0)


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_thirty_processes_killed_while_saving_leave_no_unreadable_one(
    tmp_path: Path, rng: random.Random
) -> None:
    folder = tmp_path / "run"
    began = time.monotonic()
    put(Snapshots(folder), 0)
    took = time.monotonic() - began  # kills fall into the first saves on any machine
    cut = 0
    newest = 0

    def save_forever() -> None:
        snapshots = Snapshots(folder)
        for step in range(newest + 1, newest + 10_000):
            put(snapshots, step - step % 2)  # each step twice: the second time changes nothing
            put(snapshots, step, step + 1)

    for _ in range(30):
        pid = child(save_forever)
        time.sleep(rng.uniform(0, 8 * min(took, 0.1)))
        kill(pid)
        cut += not no_rubbish(folder)
        told: list[str] = []
        found = Snapshots(folder).latest(tell=told.append)
        assert found is not None
        assert not told
        assert number_of(found) in (found.step, found.step + 1)
        assert found.step >= newest
        newest = found.step
    assert cut, "all kills fell beside the saves"
    assert newest, "no save came to its end"


def test_drafts_of_the_dead_are_removed_and_of_the_living_are_not(store: Snapshots) -> None:
    dead = child(lambda: None)
    os.waitpid(dead, 0)
    alive = os.getppid()
    for pid in (dead, alive, os.getpid(), 0, 10**17):
        (store.folder / f"step-000000005.tmp-{pid}" / "inner").mkdir(parents=True)
        (store.folder / f"LATEST.tmp-{pid}").write_bytes(b"")
    store.latest()
    left = [name for name in os.listdir(store.folder) if ".tmp-" in name]
    assert sorted(left) == [f"LATEST.tmp-{alive}", f"step-000000005.tmp-{alive}"]


def linger(ready: int) -> None:
    os.write(ready, b"x")
    time.sleep(60)


def hold(path: Path, ready: int) -> None:
    with Lock(path):
        linger(ready)


def test_a_lock_names_its_holder_and_ends_with_it(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    heard, ready = os.pipe()
    pid = child(lambda: hold(path, ready))
    assert os.read(heard, 1) == b"x"
    assert path.read_text() == f"{pid}\n"
    with pytest.raises(RunExistsError, match=rf"{re.escape(str(path))}: process {pid} is at work"):
        Lock(path)
    kill(pid)
    with Lock(path) as lock:
        assert path.read_text() == f"{os.getpid()}\n"
        with pytest.raises(RunExistsError, match=str(os.getpid())):
            Lock(path)
        lock.close()
        Lock(path).close()
    os.close(heard)
    os.close(ready)


def test_a_forked_worker_does_not_outlive_its_parent_with_the_lock(tmp_path: Path) -> None:
    heard, ready = os.pipe()
    lock = Lock(tmp_path / ".lock")
    worker = child(lambda: linger(ready))
    assert os.read(heard, 1) == b"x"
    with pytest.raises(RunExistsError):
        Lock(tmp_path / ".lock")
    lock.close()
    Lock(tmp_path / ".lock").close()
    kill(worker)
    os.close(heard)
    os.close(ready)


def test_a_lock_in_no_folder_names_the_path(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent"):
        Lock(tmp_path / "absent" / ".lock")
