"""Lives that end at a random time: one process imports torch once and forks a child a life.

Run as a script, ``_killed.py SUBJECT FOLDER COUNT SEED [FAULT]``; prints one JSON object. The
child trains, or goes on with, what lies in a folder; the parent kills it, starts it again, and
compares what it made in the end with what a life that was left alone made.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import mmap
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import attar
from attar.losses import kl_divergence, mse
from attar.runtime import Run, Snapshots
from attar.runtime.snapshot_format import FileEntry, Manifest, encoded, sealed, serialized
from attar.training import Home, Term, adamw, fit
from attar.training import state as states

PHASES = ["start", "training", "resume", "step", "save", "last save", "validation"]
PHASES += ["evaluation", "model", "report", "end"]
PHASE, LENGTH, SAVED, TEXT = 0, 1, 2, 1024  # cells of 8 bytes, but TEXT, which is a byte
EPOCHS = 3
LONGEST_AIM = 0.02  # seconds after a phase has begun

RECIPE = """\
task: image-classification
data: digits
teacher:
  model: {name: mlp, widths: [16]}
  train: {epochs: 2, batch_size: 128, checkpoint_every: 3}
student: {name: mlp, widths: [4]}
stages:
  - &distill
    do: distill
    epochs: 1
    batch_size: 128
    checkpoint_every: 3
    terms: [{loss: {name: kl_divergence, temperature: 4.0}, weight: 0.9}]
    label_weight: 0.1
"""
SECOND = RECIPE[RECIPE.index("    do:") :]
RECIPE = RECIPE.replace("&distill\n    ", "") + SECOND.replace("    do:", "  - do:", 1)


class Board:
    """Memory that a child shares with its parent, and that outlives it."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 1 << 15)
        self.cells = memoryview(self._memory).cast("q")
        self.stages: list[str] = []
        self.clear()

    @property
    def phase(self) -> str:
        return PHASES[self.cells[PHASE]]

    @contextmanager
    def at(self, phase: str) -> Iterator[None]:
        before, self.cells[PHASE] = self.cells[PHASE], PHASES.index(phase)
        yield
        self.cells[PHASE] = before  # not after an error: it says where a signal came

    def say(self, text: str) -> None:
        data = text.encode()[-20_000:]
        self._memory[TEXT : TEXT + len(data)] = data
        self.cells[LENGTH] = len(data)

    @property
    def text(self) -> str:
        return self._memory[TEXT : TEXT + self.cells[LENGTH]].decode()

    def clear(self) -> None:
        """Before a new run: nothing is saved yet."""
        for cell in range(SAVED, TEXT // 8):
            self.cells[cell] = -1

    def saved(self, folder: Path) -> int:
        """The cell of the newest step that a stage has saved."""
        if folder.name not in self.stages:
            return SAVED
        return SAVED + 1 + self.stages.index(folder.name)


BOARD = Board()


def watch(owner: Any, name: str, phase: str) -> None:
    """Have a function say where the child is."""
    real = getattr(owner, name)

    def call(*args: Any, **options: Any) -> Any:
        with BOARD.at(phase):
            return real(*args, **options)

    setattr(owner, name, call)


def watch_all() -> None:
    save, latest = Snapshots.save, Snapshots.latest

    def saving(self: Snapshots, step: int, parts: Any, facts: Any) -> Path:
        last = facts["state"]["place"]["epoch"] == EPOCHS
        with BOARD.at("last save" if last else "save"):
            folder = save(self, step, parts, facts)
        BOARD.cells[BOARD.saved(self.folder)] = step
        return folder

    def looking(self: Snapshots, **options: Any) -> Any:
        with BOARD.at("resume"):
            found = latest(self, **options)
        step, saved = -1 if found is None else found.step, BOARD.cells[BOARD.saved(self.folder)]
        assert step >= saved, f"step {saved} of {self.folder} was saved, but {step} is found"
        return found

    Snapshots.save, Snapshots.latest = saving, looking  # type: ignore[method-assign]
    watch(importlib.import_module("attar.training.loop").Loop, "step", "step")
    fitting = importlib.import_module("attar.training.fit")
    watch(fitting, "_kept_epochs", "training")
    watch(fitting, "collect", "validation")
    arms = importlib.import_module("attar.recipes.arms")
    watch(arms, "collect", "evaluation")
    watch(arms, "save", "model")
    recipes = importlib.import_module("attar.recipes.run")
    watch(recipes, "_judged", "report")
    watch(recipes, "page", "report")


# What the children do.


class Noise(nn.Module):
    """Draws from every generator a model may draw from."""

    def forward(self, inputs: Tensor) -> Tensor:
        if not self.training:
            return inputs
        return inputs * (1 + 0.1 * random.random() + 0.1 * float(np.random.rand()))


def net(width: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(Noise(), nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width))
    model.extend([nn.ReLU(), nn.Flatten(), nn.Dropout(0.2)])
    model.add_module("body", nn.Linear(width * 64, 4 * width))
    model.add_module("head", nn.Linear(4 * width, 10))
    return model


def training(data: Any, validation: Any, folder: Path) -> str:
    """Everything on; in each life other random states, which must not matter."""
    kl = Term(partial(kl_divergence, temperature=2.0), weight=lambda progress: 1 - progress / 2)
    body = Term(mse, "feature:body", projector=attar.models.projectors.linear, weight=0.1)
    student = net(2, seed=1)
    torch.manual_seed(os.getpid())
    random.seed(os.getpid())
    np.random.seed(os.getpid())
    with Run(folder, resume=True) as run:
        done = fit(
            student,
            net(4, seed=2).eval(),
            data,
            attar.tasks.ImageClassification(),
            [kl, body],
            validation=validation,
            home=Home(run, resume=True),
            progress=False,
            epochs=EPOCHS,
            batch_size=16,
            accumulate=3,
            optimizer=partial(adamw, lr=0.01),
            average=0.9,
            clip=1.0,
            augment=[partial(attar.data.crop, pixels=1)],
            keep="best",
            log_every=3,
            checkpoint_every=2,
            seed=5,
        )
    BOARD.cells[PHASE] = PHASES.index("end")
    found = hashlib.sha256(json.dumps(done.history).encode())
    for state in (done.student.state_dict(), done.last):
        for name, tensor in state.items():
            found.update(name.encode() + tensor.numpy().tobytes())
    log = hashlib.sha256((folder / "metrics.jsonl").read_bytes())
    return f"{found.hexdigest()} {log.hexdigest()}"


def subject_memory() -> Callable[[Path], str]:
    digits = attar.data.digits()
    picked = attar.data.Subset(digits.train, torch.arange(144))
    return partial(training, picked, attar.data.Subset(digits.test, torch.arange(40)))


def subject_workers() -> Callable[[Path], str]:
    """A data set that two more processes read."""
    digits = attar.data.digits()
    rows = digits.train.rows(torch.arange(144))
    items = list(zip(rows["inputs"].numpy(), rows["labels"].numpy(), strict=True))
    data = attar.data.DatasetSource(items, classes=10, workers=2)
    return partial(training, data, attar.data.Subset(digits.test, torch.arange(40)))


def made(folder: Path) -> str:
    """What a finished recipe left: scores, weights, log."""
    verdict = json.loads((folder / "verdict.json").read_text())
    scores = {name: verdict["models"][name]["scores"] for name in verdict["models"]}
    files = [*sorted(folder.glob("*/model.safetensors")), folder / "metrics.jsonl"]
    digests = {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }
    return json.dumps({"scores": scores, "difference": verdict["difference"], "files": digests})


def subject_recipe() -> Callable[[Path], str]:
    def work(folder: Path) -> str:
        recipe = folder.parent / "recipe.yaml"
        recipe.write_text(RECIPE)
        attar.recipes.run(recipe, folder=folder, resume=True, progress=False)
        BOARD.cells[PHASE] = PHASES.index("end")
        return made(folder)

    return work


# What the parent does.


def life(work: Callable[[], str], phase: str = "start") -> int:
    """Fork a child that does *work* and says what came of it; its process number."""
    BOARD.cells[PHASE], BOARD.cells[LENGTH] = PHASES.index(phase), 0
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        BOARD.say(work())
        code = 0
    except BaseException:
        BOARD.say(traceback.format_exc())
    finally:
        os._exit(code)


def warmed(work: Callable[[], str], folder: Path) -> None:
    """Live once, and import here what that life had to import: no later one waits for it.

    Only imported: a process that has trained has more to it than a forked child can use.
    """

    def noting() -> str:
        work()
        (folder / "modules.json").write_text(json.dumps(list(sys.modules)))
        return ""

    if ended(life(noting)) != 0:
        raise SystemExit(BOARD.text)
    for name in json.loads((folder / "modules.json").read_text()):
        with suppress(Exception):
            importlib.import_module(name)
    BOARD.clear()


def has_ended(child: int) -> bool:
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None


def ended(child: int) -> int:
    """Wait for the end; the exit code, or minus the signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def await_phase(child: int, phase: str, times: int = 1) -> bool:
    """Wait until the child enters *phase* for the n-th time; False where it ends before."""
    seen, before = 0, ""
    while seen < times and not has_ended(child):
        now = BOARD.phase
        seen += now == phase and before != phase
        before = now
        time.sleep(0.0003)
    return seen == times


def strike(child: int, chance: random.Random, usual: float, phases: list[str]) -> None:
    """Kill at any time, or soon after a phase has begun, however short it is."""
    if chance.random() < 0.5:
        time.sleep(chance.uniform(0, 0.7 * usual))
    elif await_phase(child, chance.choice(phases), chance.randint(1, 3)):
        time.sleep(chance.uniform(0, LONGEST_AIM))
    os.kill(child, signal.SIGKILL)  # where it has ended, nothing happens: it is not reaped yet


def leftovers(folder: Path) -> list[str]:
    """What a finished run should not leave: temporary names, and hidden ones but the lock."""
    names = [str(path.relative_to(folder)) for path in folder.rglob("*")]
    hidden = [name for name in names if "/." in f"/{name}" and name != ".lock"]
    return [name for name in names if ".tmp-" in name or ".old-" in name] + hidden


def killed(
    work: Callable[[Path], str], folder: Path, kills: int, seed: int, phases: list[str]
) -> dict[str, Any]:
    """Kill lives until there were *kills*, and let the last run come to its end."""
    warmed(partial(work, folder / "warm"), folder)
    chance, begun = random.Random(seed), time.monotonic()
    if ended(life(partial(work, folder / "alone"))) != 0:
        raise SystemExit(BOARD.text)
    expected, usual = BOARD.text, time.monotonic() - begun
    BOARD.stages = sorted(path.name for path in (folder / "alone" / "checkpoints").iterdir())
    counts: Counter[str] = Counter()
    done: dict[str, Any] = {"runs": 0, "differing": [], "leftovers": [], "fault": None}
    while counts.total() < kills and done["fault"] is None:
        place = folder / f"run-{done['runs']}"
        BOARD.clear()
        while True:
            child = life(partial(work, place))
            if counts.total() < kills:
                strike(child, chance, usual, phases)
            code = ended(child)
            if code != -signal.SIGKILL:
                break
            counts[BOARD.phase] += 1
        if code != 0:
            done["fault"] = f"after {counts.total()} kills: {BOARD.text or code}"
        else:
            done["runs"] += 1
            done["leftovers"] += leftovers(place)
            if BOARD.text != expected:
                done["differing"].append([BOARD.text, expected])
            shutil.rmtree(place)
    seconds = time.monotonic() - begun
    times = {"seconds": seconds, "usual": usual}
    return {**done, "kills": counts.total(), "phases": dict(counts), **times}


# Signals to the command.


def command(words: list[str], output: Path) -> str:
    """The console script's entry point; its exit code."""
    cli = importlib.import_module("attar.cli.main")
    guarded = cli._guarded

    def inside(work: Callable[[], Any]) -> int:
        BOARD.cells[PHASE] = PHASES.index("start")
        code = guarded(work)
        BOARD.cells[PHASE] = PHASES.index("end")
        return code

    cli._guarded = inside
    sys.argv = ["attar", *words]
    with output.open("a") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    try:
        cli.main()
    except SystemExit as left:
        sys.stdout.flush()
        os._exit(int(left.code or 0))
    return "unreachable"


def signalled(folder: Path, count: int, seed: int, phases: list[str]) -> dict[str, Any]:
    """Interrupt the command *count* times, in each phase in turn, and go on with --resume."""
    begun, chance = time.monotonic(), random.Random(seed)
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE)

    warmed(partial(attar.recipes.run, recipe, folder=folder / "warm"), folder)  # type: ignore

    def attar_run(name: str) -> int:
        words = ["run", str(recipe), "--run", str(folder / name), "--resume", "--quiet"]
        # At the end, where nothing is sent, until the handlers are set.
        return life(partial(command, words, folder / f"{name}.txt"), "end")

    if code := ended(attar_run("alone")):
        raise SystemExit(f"{code} {(folder / 'alone.txt').read_text()}")
    expected = made(folder / "alone")
    BOARD.stages = sorted(path.name for path in (folder / "alone" / "checkpoints").iterdir())
    done: dict[str, Any] = {"runs": 0, "differing": [], "leftovers": [], "wrong": [], "sent": []}
    while len(done["sent"]) < count:
        name = f"run-{done['runs']}"
        BOARD.clear()
        while True:
            child = attar_run(name)
            sent = None
            if len(done["sent"]) < count:
                number = chance.choice([signal.SIGTERM, signal.SIGINT])
                sent = _interrupt(child, number, phases[len(done["sent"]) % len(phases)], chance)
            code = ended(child)
            if sent is None:
                break
            done["sent"].append(sent)
            if code != 128 + number:
                done["wrong"].append([*sent, code, (folder / f"{name}.txt").read_text()[-3000:]])
        if code != 0:
            done["wrong"].append(["resumed", code, (folder / f"{name}.txt").read_text()[-3000:]])
            break
        done["runs"] += 1
        done["leftovers"] += leftovers(folder / name)
        if (found := made(folder / name)) != expected:
            done["differing"].append([found, expected])
    return {**done, "seconds": time.monotonic() - begun}


def _interrupt(
    child: int, number: int, phase: str, chance: random.Random
) -> tuple[str, str] | None:
    """Send a signal some time after *phase* began; what was sent where, if it was in time."""
    if not await_phase(child, phase, chance.randint(1, 3)):
        return None
    time.sleep(chance.uniform(0, LONGEST_AIM))
    at = BOARD.phase
    if at == "end" or has_ended(child):
        return None
    os.kill(child, number)
    return signal.Signals(number).name, at


# How the tests see that they would see.


def break_save() -> None:
    """Save as most do: over the one checkpoint that there is."""

    def save(self: Snapshots, step: int, parts: Any, facts: Any) -> Path:
        target = self.folder / f"step-{step:09d}"
        self.folder.mkdir(parents=True, exist_ok=True)
        for old in self.folder.glob("step-*"):
            old.rename(target)
        target.mkdir(exist_ok=True)
        files = {f"{name}.safetensors": serialized(tensors) for name, tensors in parts.items()}
        files["facts.json"] = encoded(dict(facts))
        entries = []
        for name, data in files.items():
            (target / name).write_bytes(data)
            entries.append(FileEntry(name, len(data), hashlib.sha256(data).hexdigest()))
        (target / "manifest.json").write_bytes(sealed(Manifest(step, tuple(entries))))
        return target

    Snapshots.save = save  # type: ignore[method-assign]


def break_generators() -> None:
    """Leave the random generators where they stand."""
    for name in ("generators_torch", "generators_other"):
        lost = states.ITEMS[name]._replace(give=lambda session, tensors, facts: None)
        states.ITEMS[name] = lost


def main(subject: str, folder: Path, count: int, seed: int, fault: str = "") -> None:
    torch.set_num_threads(1)
    if fault:
        globals()[f"break_{fault}"]()
    watch_all()
    if subject == "signals":
        result = signalled(folder, count, seed, ["start", "step", "evaluation", "save", "report"])
    else:
        phases = PHASES[:7] if subject != "recipe" else [*PHASES[:5], *PHASES[6:10]]
        result = killed(globals()[f"subject_{subject}"](), folder, count, seed, phases)
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), *sys.argv[5:])
