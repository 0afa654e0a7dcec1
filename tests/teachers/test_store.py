"""The files of a teacher's cache: what is added comes back, and nothing broken is believed."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors import safe_open

from attar.runtime import DataError, RunExistsError, UsageError
from attar.teachers import joining
from attar.teachers.manifest import Entry, Manifest, read_manifest
from attar.teachers.shard import Commit, Layout
from attar.teachers.store import Field, Store, join

SLOTS = 300
FIELDS = [
    Field("output:logits", "float32", (5,)),
    Field("ids", "int32", (2, 3)),
    Field("half", "float16", (3,)),
    Field("content", "int64", ()),
    Field("flag", "uint8", ()),
]
Rows = dict[str, NDArray[Any]]


def answers(slots: Any, salt: int = 0) -> Rows:
    """What the teacher says of these slots; another thing for each."""
    slots = np.asarray(slots, dtype=np.int64)
    grown = (slots + salt).reshape(-1, 1)
    return {
        "output:logits": (grown * 3 + np.arange(5) / 8).astype(np.float32),
        "ids": (grown * 7 + np.arange(6)).astype(np.int32).reshape(-1, 2, 3),
        "half": (grown % 100 + np.arange(3) / 4).astype(np.float16),
        "content": (slots + salt) * (1 << 40),
        "flag": (slots % 251).astype(np.uint8),
    }


def opened(folder: Path, writer: str | None = None, **more: Any) -> Store:
    """About 64 rows a shard unless told otherwise."""
    return Store(folder, slots=SLOTS, fields=FIELDS, writer=writer, **{"shard_bytes": 1, **more})


def put(store: Store, slots: Any, salt: int = 0) -> None:
    store.add(np.asarray(slots, dtype=np.int64), answers(slots, salt))


def same(store: Store, slots: Any, salt: int = 0) -> None:
    """Each array is equal to the bit, of its own type and shape."""
    found, wanted = store.take(np.asarray(slots, dtype=np.int64)), answers(slots, salt)
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        assert found[name].tobytes() == array.tobytes(), name


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    """A cache of 200 rows in four shards: three of 64, one of 8."""
    with opened(tmp_path / "cache", "w") as store:
        put(store, range(200))
    return tmp_path / "cache"


@pytest.fixture
def unsealed(tmp_path: Path) -> Path:
    """A copy of a cache whose writer was cut: 64 rows in a shard, 36 in a part, 3 batches."""
    store = opened(tmp_path / "live", "w")
    for start in range(0, 100, 12):
        put(store, range(start, min(100, start + 12)))
    assert store.shards()
    shutil.copytree(tmp_path / "live", tmp_path / "cut")
    store.close()
    return tmp_path / "cut"


# What is added comes back


@st.composite
def fillings(draw: st.DrawFn) -> tuple[list[list[int]], list[bool]]:
    """Slots in any order, cut into batches in any way; after which batches to open anew."""
    slots = draw(st.permutations(range(SLOTS)))[: draw(st.integers(1, SLOTS))]
    cuts = sorted(draw(st.lists(st.integers(0, len(slots)), max_size=6)))
    batches = [slots[a:b] for a, b in zip([0, *cuts], [*cuts, len(slots)], strict=True)]
    return batches, draw(st.lists(st.booleans(), min_size=len(batches), max_size=len(batches)))


@given(fillings(), st.sampled_from([1, 5_000, 1 << 20]), st.randoms())
def test_any_order_and_any_split_of_adds_gives_back_the_same_rows(
    tmp_path_factory: pytest.TempPathFactory, plan: Any, shard_bytes: int, chance: random.Random
) -> None:
    folder = tmp_path_factory.mktemp("any")
    batches, again = plan
    store = opened(folder, "w", shard_bytes=shard_bytes)
    done: list[int] = []
    for batch, anew in zip(batches, again, strict=True):
        put(store, batch)
        done += batch
        if anew:
            store.close()
            store = opened(folder, "w", shard_bytes=shard_bytes)
        assert store.filled == len(done)
        picked = chance.choices(done, k=40) if done else []
        same(store, picked)
    store.close()
    with opened(folder) as reader:
        assert reader.known(np.arange(SLOTS)).nonzero()[0].tolist() == sorted(done)
        same(reader, done)
        same(reader, [])
        assert reader.verify() == []
    shutil.rmtree(folder)


def test_a_slot_that_is_there_is_passed_over_and_of_two_the_first_counts(tmp_path: Path) -> None:
    with opened(tmp_path, "w") as store:
        put(store, [5, 7])
        slots = [9, 5, 9, 8, 7]
        rows = answers(slots, salt=1)
        rows["content"][2] = -1  # of the second 9
        store.add(np.array(slots), rows)
        same(store, [5, 7])
        same(store, [9, 8], salt=1)
        assert store.filled == 4
        put(store, [5, 7, 8, 9])
    assert sum(shard["rows"] for shard in opened(tmp_path).shards()) == 4


def test_a_batch_may_be_larger_than_a_shard(tmp_path: Path) -> None:
    with opened(tmp_path, "w") as store:
        put(store, range(SLOTS))
        same(store, range(SLOTS))
    assert [shard["rows"] for shard in opened(tmp_path).shards()] == [64, 64, 64, 64, 44]


def test_rows_that_do_not_lie_in_one_piece_are_written_as_they_read(tmp_path: Path) -> None:
    slots = np.arange(40)
    rows = answers(slots)
    with opened(tmp_path, "w") as store:
        store.add(slots[::-2], {name: array[::-2] for name, array in rows.items()})
        same(store, slots[1::2])


def test_what_is_taken_may_be_changed(sealed: Path) -> None:
    with opened(sealed) as store:
        for slots in ([3, 2], [3, 100], [70, 71]):
            for array in store.take(np.array(slots)).values():
                array[...] = 0
            same(store, slots)


def test_a_sealed_shard_is_a_safetensors_file(sealed: Path) -> None:
    for number, shard in enumerate(opened(sealed).shards()):
        path = sealed / shard["file"]
        assert path.stat().st_size == shard["bytes"]
        slots = np.arange(64 * number, 64 * number + shard["rows"])
        with safe_open(path, "np") as file:
            assert sorted(file.keys()) == sorted(["slots", *answers([])])
            for name, array in {"slots": slots, **answers(slots)}.items():
                assert file.get_tensor(name).dtype == array.dtype
                assert (file.get_tensor(name) == array).all()


@given(st.lists(st.sampled_from(["float64", "int32", "float16", "uint8"]), max_size=5), st.data())
def test_the_arrays_of_a_shard_are_aligned(dtypes: list[str], data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 5), max_size=2))
    rows = data.draw(st.integers(1, 1 << 20))
    layout = Layout([Field(f"f{n}", dtype, tuple(shape)) for n, dtype in enumerate(dtypes)])
    assert len(layout.header(rows)) % 64 == 0
    assert layout.header(rows)[8:].decode().strip()[-1] == "}"
    stop = len(layout.header(rows))
    for field, start in layout.places(rows):
        assert start == stop  # no hole
        assert start % np.dtype(field.dtype).itemsize == 0
        stop = start + rows * field.bytes
    assert stop == layout.size(rows)
    assert all(start % 64 == 0 for _, start in layout.places(rows * 64))


def test_a_reader_sees_what_others_have_committed_once_it_looks(tmp_path: Path) -> None:
    one, two = opened(tmp_path, "one"), opened(tmp_path, "two")
    reader = opened(tmp_path)
    put(one, range(10))
    put(two, range(100, 130))
    assert reader.filled == 0
    reader.refresh()
    assert reader.filled == 40
    same(reader, [3, 129, 100, 0])
    put(one, range(10, 90))  # the part that the reader knows is full and sealed
    one.close()
    two.refresh()
    same(two, range(90))
    put(two, range(80, 140))
    reader.refresh()
    assert reader.filled == 140
    same(reader, range(140)[::-1])
    two.close()
    reader.refresh()
    same(reader, range(140))
    with opened(tmp_path) as late:
        assert late.filled == 140
        assert late.verify() == []
        assert sum(shard["rows"] for shard in late.shards()) == 140


def test_the_first_missing_slot_is_named(sealed: Path) -> None:
    with opened(sealed) as store, pytest.raises(DataError, match="slot 250 has no row yet"):
        store.take(np.array([3, 250, 249]))


# What cannot be is refused


@pytest.mark.parametrize("slot", [-1, SLOTS, -SLOTS, 1 << 40])
def test_a_slot_beyond_the_cache_is_refused(tmp_path: Path, slot: int) -> None:
    with opened(tmp_path, "w") as store:
        put(store, range(SLOTS))
        slots = np.array([4, slot])
        for call in (store.take, store.known, lambda s: store.add(s, answers(s))):
            with pytest.raises(UsageError, match=f"slot {slot} is none of the 300 slots"):
                call(slots)


def test_slots_are_whole_numbers_in_a_row(sealed: Path) -> None:
    with opened(sealed) as store:
        same(store, [1, 2])
        assert store.take(np.array([1, 2], dtype=np.uint8))["flag"].tolist() == [1, 2]
        for wrong in (np.zeros((1, 1), dtype=int), np.array([0.5]), np.array(1)):
            with pytest.raises(UsageError, match="whole numbers in one row"):
                store.take(wrong)


def change_type(rows: Rows) -> None:
    rows["half"] = rows["half"].astype(np.float32)


def change_shape(rows: Rows) -> None:
    rows["ids"] = rows["ids"].reshape(-1, 3, 2)


def change_count(rows: Rows) -> None:
    rows["flag"] = rows["flag"][:-1]


def change_name(rows: Rows) -> None:
    rows["more"] = rows.pop("flag")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (change_type, r"'half' of 3 slots is float32 \[3, 3\].* keeps float16 \[3, 3\]"),
        (change_shape, r"'ids' .*int32 \[3, 3, 2\].* keeps int32 \[3, 2, 3\]"),
        (change_count, r"'flag' .* uint8 \[2\].* keeps uint8 \[3\]"),
        (change_name, "the rows have the fields .*'more'.* but this cache keeps .*'flag'"),
    ],
)
def test_rows_of_another_form_are_refused_and_nothing_is_written(
    tmp_path: Path, change: Callable[[Rows], None], named: str
) -> None:
    with opened(tmp_path, "w") as store:
        rows = answers([1, 2, 3])
        change(rows)
        with pytest.raises(UsageError, match=named):
            store.add(np.array([1, 2, 3]), rows)
        assert store.filled == 0
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ([Field("slots", "int64", ())], "cannot be called 'slots'"),
        ([Field("__metadata__", "int64", ())], "cannot be called '__metadata__'"),
        ([Field("a\n", "int64", ())], "cannot be called"),
        ([Field("\udc80", "int64", ())], "cannot be called"),
        ([Field("x", "object", ())], "'x' has the type 'object'"),
        ([Field("x", ">f4", ())], "'x' has the type '>f4'"),
        ([Field("x", "int8", (0,))], "'x' has rows of shape"),
        ([Field("x", "int8", ()), Field("x", "int8", ())], "the same name"),
        ([Field(f"{n:099}", "int8", ()) for n in range(9999)], "9999 fields are too many"),
    ],
)
def test_fields_that_no_file_can_hold_are_refused(
    tmp_path: Path, fields: list[Field], named: str
) -> None:
    with pytest.raises(UsageError, match=named):
        Store(tmp_path, slots=3, fields=fields)


@pytest.mark.parametrize("name", ["", "about", "../w", "a/b", "W", "w.json", "w-", "a" * 65, "\n"])
def test_a_name_that_is_no_writers_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="names of writers"):
        opened(tmp_path, name)


@pytest.mark.parametrize("slots", [0, -1, 1 << 33])
def test_a_number_of_slots_that_cannot_be_is_refused(tmp_path: Path, slots: int) -> None:
    with pytest.raises(UsageError, match="slots is"):
        Store(tmp_path, slots=slots, fields=FIELDS)


def test_who_only_reads_cannot_add(sealed: Path) -> None:
    with opened(sealed) as store:
        put(store, [1])  # there already: nothing to write
        with pytest.raises(UsageError, match="give writer a name"):
            put(store, [250])


def test_a_closed_store_says_so(sealed: Path) -> None:
    store = opened(sealed, "w")
    store.close()
    store.close()
    for call in (store.take, store.known):
        with pytest.raises(UsageError, match="closed"):
            call(np.array([1]))
    with pytest.raises(UsageError, match="closed"):
        store.refresh()


def test_a_forked_process_neither_writes_nor_seals_what_its_parent_writes(tmp_path: Path) -> None:
    store = opened(tmp_path, "w")
    put(store, range(10))
    child = os.fork()
    if not child:
        code = 1
        try:
            same(store, range(10))
            with pytest.raises(UsageError, match="by the process that opened it"):
                put(store, [20])
            store.close()
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    put(store, range(10, 20))
    same(store, range(20))
    assert opened(tmp_path).filled == 20
    store.close()
    assert opened(tmp_path).filled == 20


def test_two_do_not_write_under_one_name(tmp_path: Path) -> None:
    one, two = opened(tmp_path, "w"), opened(tmp_path, "w")
    put(one, [1])
    two.refresh()
    same(two, [1])
    with pytest.raises(RunExistsError, match=rf"process {os.getpid()} writes here as 'w'"):
        put(two, [2])
    two.close()
    put(one, [3])
    one.close()
    with opened(tmp_path, "w") as three:
        put(three, [2])
        same(three, [1, 2, 3])
    assert sorted(shard["rows"] for shard in opened(tmp_path).shards()) == [1, 2]


def test_who_only_looked_seals_what_was_left_under_its_name(unsealed: Path) -> None:
    with opened(unsealed, "w") as store:
        same(store, range(100))
    names = set(os.listdir(unsealed))
    assert names == {".w.lock", "w.json", "w-000000.safetensors", "w-000001.safetensors"}
    with opened(unsealed) as store:
        same(store, range(100))
        assert store.verify() == []


def test_what_is_left_by_another_name_is_read_and_stays(unsealed: Path) -> None:
    before = sorted(os.listdir(unsealed))
    with opened(unsealed, "v") as store:
        same(store, range(100))
    assert sorted(os.listdir(unsealed)) == before


# What is broken is not believed


def flips(path: Path, rng: random.Random, count: int, below: int | None = None) -> Any:
    """Flip a bit of the file at *count* random places, one at a time."""
    whole = path.read_bytes()
    for _ in range(count):
        place, bit = rng.randrange(below or len(whole)), 1 << rng.randrange(8)
        path.write_bytes(whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :])
        yield place
    path.write_bytes(whole)


def test_any_flipped_bit_of_a_sealed_cache_is_told(sealed: Path) -> None:
    rng = random.Random(0)
    with opened(sealed) as store:
        assert store.verify() == []
        for path in sorted(sealed.glob("w*")):
            for place in flips(path, rng, 150):
                told = store.verify()
                assert told, (path, place)
                assert path.name.removesuffix(".json") in told[0]
                with pytest.raises(DataError, match=r"w(-00000\d\.safetensors|\.json): "):
                    opened(sealed)
        assert store.verify() == []


def test_a_flipped_bit_of_a_large_cache_is_told_by_verify(
    sealed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("attar.teachers.store._HASHED_AT_OPEN", 0)
    path = sealed / "w-000001.safetensors"
    for _ in flips(path, random.Random(0), 1, below=-1 + path.stat().st_size):
        spoiled = bytearray(path.read_bytes())
        path.write_bytes(spoiled)
    spoiled = bytearray(path.read_bytes())
    spoiled[-1] ^= 1
    path.write_bytes(spoiled)
    with opened(sealed) as store:
        assert store.verify() == [f"{path}: has another SHA-256 than its list says; remove the "
                                  "file, and its rows are asked for again"]  # fmt: skip


def test_a_flipped_bit_of_a_part_costs_its_batch_and_no_other(unsealed: Path) -> None:
    rng = random.Random(0)
    layout = Layout(FIELDS)
    data = (unsealed / "w-000001.part").read_bytes()
    assert len(data) == layout.size(64)
    places = list(layout.places(64))
    for _ in range(60):
        field, start = rng.choice(places)
        row = rng.randrange(36)
        spoiled = bytearray(data)
        spoiled[start + row * field.bytes + rng.randrange(field.bytes)] ^= 1 << rng.randrange(8)
        (unsealed / "w-000001.part").write_bytes(spoiled)
        with opened(unsealed) as store:
            lost = np.flatnonzero(~store.known(np.arange(100)))
            assert 64 + row in lost
            assert len(lost) in (4, 8, 12)
            same(store, np.flatnonzero(store.known(np.arange(100))))
            assert "are not what was written" in store.verify()[0]


def test_a_flipped_bit_of_a_log_costs_one_batch_at_most(unsealed: Path) -> None:
    for _ in flips(unsealed / "w-000001.log", random.Random(0), 100):
        with opened(unsealed) as store:
            assert store.filled in (88, 92, 96)
            assert store.verify()
            same(store, np.flatnonzero(store.known(np.arange(100))))


@pytest.mark.parametrize("lines", [0, 1, 2, 3])
def test_a_torn_line_is_ignored_and_written_again(unsealed: Path, lines: int) -> None:
    log = unsealed / "w-000001.log"
    whole = log.read_bytes()
    for more in (0, 1, 20, 43):
        log.write_bytes(whole[: lines * 44 + more])
        with opened(unsealed) as store:
            assert store.filled == min(100, 64 + [0, 8, 20, 32, 36][lines])
            assert store.verify() == []
    folder = unsealed
    with opened(folder, "w") as store:
        put(store, range(100))
        same(store, range(100))
    with opened(folder) as store:
        assert store.filled == 100
        assert store.verify() == []


def test_damaged_rows_are_left_out_when_the_part_is_sealed(unsealed: Path) -> None:
    part = unsealed / "w-000001.part"
    spoiled = bytearray(part.read_bytes())
    spoiled[len(Layout(FIELDS).header(64)) + 10 * 8] ^= 1  # slot 74, of the second batch
    part.write_bytes(spoiled)
    with opened(unsealed, "w") as store:
        assert store.filled == 88
        put(store, range(64, 130))
        same(store, range(130))
    with opened(unsealed) as store:
        assert store.verify() == []
        same(store, range(130))
        assert sum(shard["rows"] for shard in store.shards()) == 130


def test_a_shard_that_is_removed_is_asked_for_again(sealed: Path) -> None:
    (sealed / "w-000001.safetensors").unlink()
    with opened(sealed, "w") as store:
        assert store.filled == 136
        assert store.verify() == [f"{sealed}/w-000001.safetensors: is listed but not there; its "
                                  "rows are asked for again"]  # fmt: skip
        put(store, range(200))
        same(store, range(200))
    with opened(sealed) as store:
        assert store.verify() == []
        assert [shard["file"][2:8] for shard in store.shards()] == [
            "000000", "000002", "000003", "000004",
        ]  # fmt: skip


def replaced(content: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(content(path.read_bytes())) and None


def with_header(text: bytes) -> Callable[[Path], None]:
    return replaced(lambda data: struct.pack("<Q", len(text)) + text + data[-8_000:])


def spoil_link(path: Path) -> None:
    path.rename(path.parent.parent / "elsewhere")
    path.symlink_to(path.parent.parent / "elsewhere")


def spoil_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def spoil_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def spoil_sparse(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(1 << 42)


HOSTILE: dict[str, Callable[[Path], None]] = {
    "empty": replaced(lambda data: b""),
    "short": replaced(lambda data: data[:7]),
    "cut": replaced(lambda data: data[:-1]),
    "longer": replaced(lambda data: data + b"\0"),
    "length 0": replaced(lambda data: struct.pack("<Q", 0) + data[8:]),
    "length 2^63": replaced(lambda data: struct.pack("<Q", 1 << 63) + data[8:]),
    "length 2^64-1": replaced(lambda data: b"\xff" * 8 + data[8:]),
    "length beyond the file": replaced(lambda data: struct.pack("<Q", len(data)) + data[8:]),
    "length 100 MB": replaced(lambda data: struct.pack("<Q", 10**8) + data[8:]),
    "no json": with_header(b"{" * 10_000),
    "deep json": with_header(b"[" * 100_000),
    "other json": with_header(b'{"slots":{"dtype":"I64","shape":[1],"data_offsets":[0,8]}}'),
    "other dtype": replaced(lambda data: data.replace(b'"F16"', b'"I16"')),
    "overlap": replaced(lambda data: data.replace(b'"data_offsets":[0,', b'"data_offsets":[8,')),
    "link": spoil_link,
    "pipe": spoil_pipe,
    "folder": spoil_folder,
    "sparse": spoil_sparse,
}


@pytest.mark.parametrize("file", ["w-000001.safetensors", "w-000001.part"])
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_shard_is_refused_by_name(
    request: pytest.FixtureRequest, name: str, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = request.getfixturevalue("unsealed" if file.endswith("part") else "sealed")
    monkeypatch.setattr("attar.teachers.store._HASHED_AT_OPEN", 0)
    with opened(folder) as store:
        HOSTILE[name](folder / file)
        assert any(file in told for told in store.verify())
    with pytest.raises(DataError, match=rf"{file}: .*remove the file, and its rows are asked"):
        opened(folder)


def rewritten(folder: Path, change: Callable[[Any], None]) -> None:
    """Change a manifest and seal it again, as its author could."""
    told = json.loads((folder / "w.json").read_text())
    change(told)
    shards = [Entry(e["file"], e["rows"], e["bytes"], e["sha256"]) for e in told["shards"]]
    (folder / "w.json").write_bytes(Manifest(told["order"], tuple(shards)).encoded())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("file", "../w-000001.safetensors"), ("file", "/etc/passwd"), ("file", "w-000001.part"),
        ("file", "v-000001.safetensors"), ("file", "w-1.safetensors"), ("file", 3),
        ("file", "w-000000.safetensors"), ("file", "w-000001.safetensors\n"), ("file", None),
        ("rows", -1), ("rows", 0), ("rows", True), ("rows", 1.5), ("rows", "8"), ("bytes", -4),
        ("sha256", None), ("sha256", 5),
    ],
)  # fmt: skip
def test_a_hostile_manifest_is_refused(sealed: Path, key: str, value: Any) -> None:
    rewritten(sealed, lambda told: told["shards"][1].update({key: value}))
    with pytest.raises(DataError, match=r"w\.json: is not the list of shards that was written"):
        opened(sealed)


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b"[" * 100_000, b'{"shards":3}', b"\xff"])
def test_what_is_no_manifest_is_refused(sealed: Path, data: bytes) -> None:
    (sealed / "w.json").write_bytes(data)
    with pytest.raises(DataError, match=r"w\.json: is not the list of shards"):
        opened(sealed)


@pytest.mark.parametrize(("key", "value"), [("rows", 63), ("bytes", 1 << 60)])
def test_a_manifest_that_does_not_agree_with_its_file_is_refused(
    sealed: Path, key: str, value: int
) -> None:
    rewritten(sealed, lambda told: told["shards"][1].update({key: value}))
    with pytest.raises(DataError, match=r"w-000001\.safetensors: has 64 rows"):
        opened(sealed)


@pytest.mark.parametrize(
    ("slot", "named"),
    [(65, "holds a slot twice"), (SLOTS, "none of 0 to 299"), (-1, "none of 0 to 299")],
)
@pytest.mark.parametrize("kind", ["safetensors", "part"])
def test_slots_that_cannot_be_are_refused_though_all_hashes_agree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slot: int, named: str, kind: str
) -> None:
    monkeypatch.setattr("attar.teachers.store._HASHED_AT_OPEN", 0)
    store = opened(tmp_path / "a", "w")
    put(store, range(64, 100))
    if kind == "safetensors":
        store.close()
    path = tmp_path / "a" / f"w-000000.{kind}"
    layout, data = Layout(FIELDS), bytearray(path.read_bytes())
    rows = 36 if kind == "safetensors" else 64
    start = len(layout.header(rows))
    data[start : start + 8] = struct.pack("<q", slot)
    path.write_bytes(data)
    if kind == "part":
        store._writer.part.path = path  # type: ignore[union-attr]
        arrays = [data[a : a + 36 * f.bytes] for f, a in layout.places(64)]
        import zlib

        (tmp_path / "a" / "w-000000.log").write_bytes(
            Commit(0, 36, zlib.crc32(b"".join(arrays))).line()
        )
        shutil.copytree(tmp_path / "a", tmp_path / "b")
        folder = tmp_path / "b"
    else:
        folder = tmp_path / "a"
    with pytest.raises(DataError, match=named), opened(folder, "w") as other:
        put(other, [1])


def test_a_cache_of_other_fields_is_refused(sealed: Path) -> None:
    with pytest.raises(DataError, match=r"w-000000\.safetensors: is not a shard.*float32\[5\]"):
        Store(sealed, slots=SLOTS, fields=FIELDS[:-1])
    with pytest.raises(DataError, match=r"holds a slot that is none of 0 to 99"):
        Store(sealed, slots=100, fields=FIELDS)


def test_files_of_others_are_left_alone(sealed: Path) -> None:
    for name in (
        "notes.txt",
        "w-000001.safetensors.bak",
        "x-1.part",
        "W-000000.part",
        "about.json",
    ):
        (sealed / name).write_bytes(b"?")
    (sealed / "figures").mkdir()
    with opened(sealed, "w") as store:
        same(store, range(200))
        assert store.verify() == []
    assert (sealed / "notes.txt").exists()


def test_a_shard_that_no_list_names_is_not_used(sealed: Path) -> None:
    shutil.copy(sealed / "w-000000.safetensors", sealed / "v-000000.safetensors")
    with opened(sealed) as store:
        assert store.filled == 200
        assert store.verify() == [f"{sealed}/v-000000.safetensors: v.json does not list it, so it "
                                  "is not used; remove it"]  # fmt: skip


# Folders are brought together


ABOUT = {"format": "attar-cache", "asked": {"teacher": 7}, "made": {"date": "today"}}


def cache(folder: Path, writer: str, slots: Any, salt: int = 0, **about: Any) -> Path:
    with opened(folder, writer) as store:
        put(store, slots, salt)
    (folder / "about.json").write_text(json.dumps({**ABOUT, **about}))
    return folder


@pytest.mark.parametrize("linked", [True, False])
def test_folders_are_joined_and_joining_again_adds_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, linked: bool
) -> None:
    if not linked:

        def refuse(*args: Any, **more: Any) -> None:
            raise OSError(18, "Invalid cross-device link")

        monkeypatch.setattr(os, "link", refuse)  # fmt: skip
    one = cache(tmp_path / "one", "rank0", range(100), made={"date": "yesterday"})
    two = cache(tmp_path / "two", "rank0", range(100, 230))
    cache(two, "rank1", range(250, 260))
    into = tmp_path / "into"
    for _ in range(2):
        join(into, [one, two])
        with opened(into) as store:
            assert store.filled == 240
            same(store, [*range(230), *range(250, 260)][::-1])
            assert store.verify() == []
            assert len(store.shards()) == 6
    assert json.loads((into / "about.json").read_text())["asked"] == {"teacher": 7}
    assert {path.stem for path in into.glob("*.json")} == {"about", "rank0", "rank0-2", "rank1"}
    assert not [name for name in os.listdir(into) if ".tmp-" in name]
    shared = (into / "rank0-000000.safetensors").stat().st_nlink
    assert shared == (2 if linked else 1)
    with opened(into, "rank0-2") as store:  # and the folder can be filled further
        put(store, range(SLOTS))
    assert opened(into).verify() == []


def test_of_a_slot_that_two_folders_hold_the_first_counts(tmp_path: Path) -> None:
    one = cache(tmp_path / "one", "z", range(10), salt=1)
    two = cache(tmp_path / "two", "a", range(5, 15), salt=2)
    into = cache(tmp_path / "into", "m", range(3), salt=3)
    join(into, [one, two])
    with opened(into) as store:
        same(store, range(3), salt=3)
        same(store, range(3, 10), salt=1)
        same(store, range(10, 15), salt=2)


def test_folders_of_other_caches_are_not_joined(tmp_path: Path) -> None:
    one = cache(tmp_path / "one", "w", range(10))
    two = cache(tmp_path / "two", "w", range(10, 20), asked={"teacher": 8})
    for into in (tmp_path / "into", one):
        with pytest.raises(DataError, match=r"asked\.teacher is 8, and was 7"):
            join(into, [two] if into == one else [one, two])
    assert not (tmp_path / "into").exists()
    assert opened(one).filled == 10


def test_what_cannot_be_joined_is_said(tmp_path: Path, unsealed: Path) -> None:
    one = cache(tmp_path / "one", "w", range(10))
    (unsealed / "about.json").write_text(json.dumps(ABOUT))
    with pytest.raises(DataError, match="'w' has not finished here"):
        join(tmp_path / "into", [unsealed])
    with pytest.raises(UsageError, match="other folders"):
        join(one, [tmp_path / "one" / "." / ""])
    with pytest.raises(UsageError, match="other folders"):
        join(one, [])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty: is no teacher's cache: it has no about\.json"):
        join(one, [tmp_path / "empty"])
    (tmp_path / "empty" / "about.json").write_text("[" * 100_000)
    with pytest.raises(DataError, match=r"about\.json: is not the description"):
        join(one, [tmp_path / "empty"])
    for _ in flips(one / "w-000000.safetensors", random.Random(0), 1):
        with pytest.raises(DataError, match=r"w-000000\.safetensors: has another SHA-256"):
            join(tmp_path / "into", [one])
    assert not list((tmp_path / "into").glob("w*"))


def test_a_join_that_was_cut_is_taken_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = cache(tmp_path / "one", "w", range(200))
    into = tmp_path / "into"
    for broken_at in range(1, 9):
        calls = 0
        for name in ("link", "replace"):
            real = getattr(os, name)

            def failing(*args: Any, real: Any = real, at: int = broken_at, **more: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls == at:
                    raise OSError(28, "No space left on device")
                return real(*args, **more)

            monkeypatch.setattr(os, name, failing)
        with pytest.raises(OSError, match="No space left"):
            join(into, [one])
        monkeypatch.undo()
    join(into, [one])
    with opened(into) as store:
        same(store, range(200))
        assert store.verify() == []
        assert len(store.shards()) == 4
    assert read_manifest(into, "w").order == 0
    assert joining.ABOUT in os.listdir(into)
