"""`attar demo`: what a training survives, shown on this machine in a minute."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="demo",
    no_args_is_help=True,
    help="See for yourself what a training survives: a toy, in a folder that is thrown away.",
)

Folder = Annotated[
    Path | None,
    typer.Option("--run", metavar="FOLDER", help="Work in this new folder, and keep it."),
]
Tell = Callable[[str], None]

ROWS, BATCH, EPOCHS = 320, 32, 6
STEPS = ROWS // BATCH * EPOCHS
EVERY = 3  # steps between two checkpoints
LAST_GOAL = 0.9  # of the steps: what is killed must not have ended
LONGEST_WAIT = 0.05  # seconds: about a step and a save
_FOLDER = re.compile(r"step-([0-9]+)(?:\.tmp-([0-9]+))?")


@app.command()
def crash(
    kills: Annotated[int, typer.Option("--kills", min=1, help="How often to kill it.")] = 20,
    folder: Folder = None,
) -> None:
    """Kill a training at random times, go on each time, and compare the weights in the end."""
    digits = _ready()
    print(
        f"A toy learns from a teacher for {STEPS} steps: batch norm, dropout, AdamW, averaged\n"
        f"weights, augmentation; a checkpoint every {EVERY} steps. Once it is left alone. Once it\n"
        f"is killed {kills} times (SIGKILL, which no program can hear) and started again.\n"
    )
    with _place(folder) as place:
        begun = time.monotonic()
        _end(_start(digits, place / "alone"))
        _say("left alone", f"{time.monotonic() - begun:.1f} s")
        begun = time.monotonic()
        _kill_often(digits, place / "killed", kills)
        _end(_start(digits, place / "killed"))
        _say(f"killed {kills}x", f"{time.monotonic() - begun:.1f} s, every start included")
        _conclude("left alone", _digest(place / "alone"), f"killed {kills}x", place / "killed")


@app.command()
def bitrot(folder: Folder = None) -> None:
    """Flip one bit in the newest checkpoint: who sees it, and what comes of it."""
    digits = _ready()
    with _place(folder) as place:
        begun = time.monotonic()
        _train(digits, place)
        _say("trained", f"{STEPS} steps in {time.monotonic() - begun:.1f} s")
        whole = _digest(place)
        newest, _ = _newest(place)
        file = _checkpoints(place) / f"step-{newest:09d}" / "objective.safetensors"
        _flip_one_bit(file)
        begun = time.monotonic()
        _train(digits, place, lambda line: _say("attar", line))
        _say("went on", f"to step {STEPS} again, in {time.monotonic() - begun:.1f} s")
        _conclude("before the bit", whole, "after it", place)


def _flip_one_bit(file: Path) -> None:
    """In the student's largest tensor, and show what safetensors' own loader makes of it."""
    from safetensors.torch import load_file

    before = {name: tensor.clone() for name, tensor in load_file(file).items()}
    data = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    tensors = json.loads(data[8:start])
    name = max(before, key=lambda key: (key.startswith("student."), before[key].nbytes))
    index = before[name].numel() // 2
    byte = start + tensors[name]["data_offsets"][0] + before[name].element_size() * (index + 1) - 1
    data[byte] ^= 1 << 6  # the highest bit of the exponent
    file.write_bytes(data)
    place = file.relative_to(file.parents[3])
    _say("flipped", f"1 bit of {8 * len(data):,}, in {place}")
    now = load_file(file)[name].flatten()[index].item()
    was = before[name].flatten()[index].item()
    _say("safetensors", f"loads it without a word; '{name}' held {was:.4g}, holds {now:.4g}")


def _kill_often(digits: Any, folder: Path, kills: int) -> None:
    """Start the training and kill it, *kills* times; each time it has come a little further."""
    chance = random.SystemRandom()
    goals = sorted(chance.uniform(-EVERY, LAST_GOAL * STEPS) for _ in range(kills))
    for number, goal in enumerate(goals, 1):
        while True:
            begun = time.monotonic()
            child = _start(digits, folder)
            while _newest(folder)[0] < goal and not _has_ended(child):
                time.sleep(0.001)
            time.sleep(chance.uniform(0, LONGEST_WAIT))
            os.kill(child, signal.SIGKILL)  # where it has ended, nothing happens
            if _end(child) == -signal.SIGKILL:
                break
        _say(
            f"kill {number:>3}", f"after {time.monotonic() - begun:5.2f} s, {_where(folder, child)}"
        )


def _where(folder: Path, child: int) -> str:
    """What a killed process was doing, by what it left on the disk."""
    newest, drafts = _newest(folder)
    if child in drafts:
        step = drafts[child]
        saving = f"step {step} was being saved"
        return f"while {saving if step > newest else f'the old step {step} was being removed'}"
    return "before the first checkpoint" if newest < 0 else f"with step {newest} saved"


def _newest(folder: Path) -> tuple[int, dict[int, int]]:
    """The newest step that has a checkpoint, or -1; the steps of half ones, by whose they are."""
    try:
        names = os.listdir(_checkpoints(folder))
    except FileNotFoundError:
        return -1, {}
    found = [match for name in names if (match := _FOLDER.fullmatch(name))]
    whole = [int(match[1]) for match in found if match[2] is None]
    return max(whole, default=-1), {int(match[2]): int(match[1]) for match in found if match[2]}


def _checkpoints(folder: Path) -> Path:
    return folder / "checkpoints" / "stage"


def _ready() -> Any:
    """The data; and import once what every life needs, so that a forked child has it at once."""
    import importlib

    import torch

    import attar

    importlib.import_module("attar.training")
    importlib.import_module("torch._dynamo")  # the first optimizer would
    torch.set_num_threads(1)  # a toy gains nothing from more, and other threads do not fork
    return attar.data.digits()


def _start(digits: Any, folder: Path) -> int:
    """Fork a process that trains, or goes on; its number."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        _alive.add(child)
        return child
    code = 1
    try:
        _train(digits, folder)
        code = 0
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(code)


_alive: set[int] = set()


def _has_ended(child: int) -> bool:
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None


def _end(child: int) -> int:
    """Wait for a process; 0, or minus the signal that killed it."""
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    _alive.discard(child)
    if code not in (0, -signal.SIGKILL):
        print("the training failed, as it says above", file=sys.stderr)
        raise typer.Exit(1)
    return code


def _train(digits: Any, folder: Path, tell: Tell = lambda line: None) -> None:
    """Everything that a resume can get wrong, in a few seconds."""
    import torch
    from torch import nn

    import attar
    from attar.losses import kl_divergence, mse
    from attar.models import projectors, save
    from attar.runtime import Run
    from attar.training import Home, Term, adamw, fit

    def net(width: int, seed: int) -> Any:
        torch.manual_seed(seed)
        body = [nn.Linear(64, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.2)]
        return nn.Sequential(nn.Flatten(), *body, nn.Linear(width, 10))

    with Run(folder, resume=True) as run:
        done = fit(
            net(16, seed=1),
            net(64, seed=2).eval(),
            attar.data.Subset(digits.train, torch.arange(ROWS)),
            attar.tasks.ImageClassification(),
            [Term(kl_divergence), Term(mse, "feature:1", projector=projectors.linear, weight=0.1)],
            validation=attar.data.Subset(digits.test, torch.arange(100)),
            home=Home(run, resume=True, tell=tell),
            progress=False,
            epochs=EPOCHS,
            batch_size=BATCH,
            optimizer=partial(adamw, lr=0.01),
            average=0.9,
            augment=[partial(attar.data.crop, pixels=1)],
            checkpoint_every=EVERY,
            device="cpu",
        )
        save(done.student, folder / "model")


def _digest(folder: Path) -> str:
    return hashlib.sha256((folder / "model" / "model.safetensors").read_bytes()).hexdigest()


@contextmanager
def _place(folder: Path | None) -> Iterator[Path]:
    """A folder to work in, thrown away unless it was named; no process outlives it."""
    from attar.runtime import check_free

    if folder is not None:
        check_free(folder)
    with tempfile.TemporaryDirectory(prefix="attar-") as temporary:
        try:
            yield folder or Path(temporary)
        finally:
            for child in list(_alive):
                os.kill(child, signal.SIGKILL)
                _end(child)


def _conclude(name: str, expected: str, other: str, folder: Path) -> None:
    """Print both digests of the trained weights; exit 1 where they differ."""
    found = _digest(folder)
    print()
    _say(name, f"SHA-256 {expected}")
    _say(other, f"SHA-256 {found}")
    equal = found == expected
    _say("equal" if equal else "DIFFERENT", "to the bit" if equal else "please report this")
    if not equal:
        raise typer.Exit(1)


def _say(what: str, line: str) -> None:
    print(f"{what:<15}{line}", flush=True)
