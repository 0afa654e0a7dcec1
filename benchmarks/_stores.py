"""Where a teacher's answers could be kept: each store writes arrays, and gathers rows by number."""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from attar.teachers.store import Field, Store

Rows = dict[str, np.ndarray]
Gather = Callable[[np.ndarray], Rows]


def memory(rows: Rows, _folder: Path) -> Gather:
    """Arrays in memory, indexed as everybody does."""
    kept = {name: array.copy() for name, array in rows.items()}
    return lambda ids: {name: array[ids] for name, array in kept.items()}


def memory_take(rows: Rows, _folder: Path) -> Gather:
    """Arrays in memory, by the fastest gather that numpy has."""
    kept = {name: array.copy() for name, array in rows.items()}
    return lambda ids: {name: array.take(ids, 0) for name, array in kept.items()}


def attar_store(rows: Rows, folder: Path, shards: int = 1) -> Gather:
    """Added in shuffled batches, as a first epoch does."""
    fields = [Field(name, str(array.dtype), array.shape[1:]) for name, array in rows.items()]
    count = len(next(iter(rows.values())))
    row_bytes = 8 + sum(array[0].nbytes for array in rows.values())
    size = -(-count // shards) * row_bytes
    order = np.random.default_rng(1).permutation(count)
    with Store(folder, slots=count, fields=fields, writer="w", shard_bytes=size) as store:
        for start in range(0, count, 1024):
            ids = order[start : start + 1024]
            store.add(ids, {name: array[ids] for name, array in rows.items()})
    return Store(folder, slots=count, fields=fields).take


def lmdb_store(rows: Rows, folder: Path) -> Gather:
    """A record a row, its fields one after the other, read in one transaction."""
    import lmdb

    kind = np.dtype([(name, array.dtype, array.shape[1:]) for name, array in rows.items()])
    count = len(next(iter(rows.values())))
    packed = np.empty(count, kind)
    for name, array in rows.items():
        packed[name] = array
    env = lmdb.open(str(folder), map_size=4 * packed.nbytes + (64 << 20))
    with env.begin(write=True) as txn:
        txn.cursor().putmulti((n.to_bytes(8, "big"), packed[n].tobytes()) for n in range(count))
    env.close()
    env = lmdb.open(str(folder), readonly=True, lock=False)
    txn = env.begin(buffers=True)

    def gather(ids: np.ndarray) -> Rows:
        found = b"".join([txn.get(n.to_bytes(8, "big")) for n in ids.tolist()])
        batch = np.frombuffer(found, kind)
        return {name: np.ascontiguousarray(batch[name]) for name in rows}

    return gather


def hf_datasets(rows: Rows, folder: Path) -> Gather:
    """A column a field, memory-mapped from disk, in numpy's format."""
    import datasets
    import pyarrow

    columns = {
        name: pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(array.ravel()), array.shape[1])
        for name, array in rows.items()
    }
    datasets.disable_progress_bars()
    datasets.Dataset(pyarrow.table(columns)).save_to_disk(str(folder))
    found = datasets.load_from_disk(str(folder)).with_format("numpy")
    return lambda ids: {name: np.asarray(column) for name, column in found[ids].items()}


def mosaic(rows: Rows, folder: Path) -> Gather:
    """MosaicML's MDS, through LocalDataset, the lighter of its two readers."""
    _skip_door("streaming")
    from streaming.base import MDSWriter
    from streaming.base.local import LocalDataset

    columns = {name: f"ndarray:{array.dtype}:{array.shape[1]}" for name, array in rows.items()}
    with MDSWriter(out=str(folder), columns=columns) as writer:
        for number in range(len(next(iter(rows.values())))):
            writer.write({name: array[number] for name, array in rows.items()})
    found = LocalDataset(str(folder))

    def gather(ids: np.ndarray) -> Rows:
        samples = [found[n] for n in ids.tolist()]
        return {name: np.stack([sample[name] for sample in samples]) for name in rows}

    return gather


def _skip_door(name: str) -> None:
    """Have a package without its own __init__, which imports torchvision for readers of images."""
    if name not in sys.modules:
        found = importlib.util.find_spec(name)
        if found is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        sys.modules[name] = importlib.util.module_from_spec(found)


PEERS: dict[str, tuple[tuple[str, ...], Callable[[Rows, Path], Gather]]] = {
    "LMDB": (("lmdb",), lmdb_store),
    "datasets": (("datasets", "pyarrow"), hf_datasets),
    "MDS": (("streaming.base",), mosaic),
}


def installed() -> tuple[dict[str, Callable[[Rows, Path], Gather]], dict[str, str]]:
    """The stores that can be imported, and why the others cannot."""
    found: dict[str, Callable[[Rows, Path], Gather]] = {}
    absent: dict[str, str] = {}
    logging.disable(logging.WARNING)
    for name, (modules, make) in PEERS.items():
        try:
            if name == "MDS":
                _skip_door("streaming")
            for module in modules:
                importlib.import_module(module)
            found[name] = make
        except Exception as error:  # a package that fails as it is imported is as good as absent
            absent[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
    logging.disable(logging.NOTSET)
    return found, absent
