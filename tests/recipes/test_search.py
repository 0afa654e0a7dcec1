"""A search: every trial is what a run would make, the smallest good one wins, nothing is lost."""

from __future__ import annotations

import html
import json
import shlex
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import attar
from attar.recipes import (
    Found,
    Search,
    Trial,
    arms,
    check,
    load_recipe,
    parse,
    run,
    search,
    search_study,
)
from attar.recipes.search_space import Range, Space, space_of
from attar.recipes.search_study import Aims, Study
from attar.recipes.search_trials import closest_of, fronts_of, winner_of
from attar.recipes.search_words import short
from attar.reporting import page
from attar.runtime import DataError, PreflightError, RunExistsError, UsageError, read_json

pytest.importorskip("optuna")

RECIPE = """\
task: image-classification
data: digits
teacher:
  model: {name: mlp, widths: [64]}
  train: {epochs: 4, batch_size: 32}
student: {name: mlp, widths: [8]}
stages:
  - do: distill
    epochs: 2
    batch_size: 32
    optimizer: {name: adamw, lr: 0.01}
    terms:
      - {loss: {name: kl_divergence, temperature: 4.0}, weight: 0.9}
    label_weight: 0.1
goal: {retain: 0.8}
search:
  trials: 4
  space:
    student.widths: [[2], [8], [24], [48]]
"""
TEST = 719  # rows of the test split
Write = Callable[..., Path]
RANGE = "student.widths: [[2], [8], [24], [48]]", "student.widths.0: {low: 2, high: 60}"


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """``write(old, new, ...)`` writes the recipe with each *old* replaced; returns its path."""

    def written(*changes: str, name: str = "recipe") -> Path:
        text = RECIPE
        for old, new in zip(changes[::2], changes[1::2], strict=True):
            assert old in text
            text = text.replace(old, new, 1)
        path = tmp_path / f"{name}.yaml"
        path.write_text(text)
        return path

    return written


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


# ---------------------------------------------------------------- the whole


def test_a_grid_finds_the_smallest_that_meets_the_goal_as_runs_by_hand_do(
    write: Write, tmp_path: Path
) -> None:
    path = write()
    found = search(path, folder=tmp_path / "search")
    assert [trial.state for trial in found.trials] == ["finished"] * 4

    by_hand = {}
    for width in (2, 8, 24, 48):
        folder = tmp_path / f"alone-{width}"
        run(path, folder=folder, overrides=[f"student.widths=[{width}]"])
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        log = [json.loads(line) for line in lines]
        seen: dict[str, list[float]] = {"teacher": [], "distilled": []}
        for record in log:
            if record["split"] == "validation" and record["arm"] in seen:
                seen[record["arm"]].append(record["accuracy"])
        kept = max(seen["distilled"]) / max(seen["teacher"])
        by_hand[width] = kept, (folder / "student" / "model.safetensors").stat().st_size

    by_width = {trial.chosen["student.widths"][0]: trial for trial in found.trials}
    for width, (kept, size) in by_hand.items():
        trial = by_width[width]
        assert trial.kept == pytest.approx(kept)
        assert trial.cost is not None
        assert trial.cost["bytes"] == size
        assert trial.met is (kept >= 0.8)
    smallest = min(width for width, (kept, _) in by_hand.items() if kept >= 0.8)
    assert smallest not in (2, 48)  # else the goal would tell nothing
    assert found.winner == by_width[smallest]
    assert found.verdict is not None
    assert found.met is found.verdict.goal.met  # type: ignore[union-attr]
    alone = tmp_path / f"alone-{smallest}" / "student"
    assert weights(tmp_path / "search" / "winner" / "student") == weights(alone)
    number = found.winner.number
    assert weights(tmp_path / "search" / "trials" / str(number) / "student") == weights(alone)


def test_the_test_split_is_asked_about_the_winner_alone(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    said: list[str] = []
    collect = arms.collect

    def spied(model: Any, source: Any, *more: Any, **options: Any) -> Any:
        if len(source) == TEST:
            asked.append(len(said))
        return collect(model, source, *more, **options)

    monkeypatch.setattr(arms, "collect", spied)
    search(write(), folder=tmp_path / "search", say=said.append)
    begins = next(i for i, line in enumerate(said) if line.startswith("winner "))
    assert asked
    assert min(asked) > begins
    # The teacher, then baseline and student, each in its best and its last epoch.
    assert len(asked) == 5


def test_where_no_student_meets_the_goal_the_closest_is_named_and_the_test_split_left_alone(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write("goal: {retain: 0.8}", "goal: {retain: 0.8, macs: 10}", "trials: 4", "trials: 2")
    collect = arms.collect

    def refused(model: Any, source: Any, *more: Any, **options: Any) -> Any:
        assert len(source) != TEST
        return collect(model, source, *more, **options)

    monkeypatch.setattr(arms, "collect", refused)
    found = search(path, folder=tmp_path / "search")
    assert found.winner is None
    assert found.met is False
    assert found.closest is not None
    least = min(found.trials, key=lambda trial: trial.missed)
    assert found.closest == least
    assert found.goal_line is not None
    assert found.goal_line.startswith("MISSED, none of 2 keeps 80 % within 10 multiply-adds")
    assert f"closest is trial {least.number} " in found.goal_line
    assert not (tmp_path / "search" / "winner").exists()


def test_without_a_goal_the_best_wins_and_its_recipe_runs_to_the_same_student(
    write: Write, tmp_path: Path
) -> None:
    path = write("goal: {retain: 0.8}\n", "", *RANGE, "trials: 4", "trials: 3")
    found = search(path, folder=tmp_path / "search")
    assert found.winner is not None
    assert found.winner.score == max(trial.score or 0 for trial in found.trials)
    assert found.goal_line is None
    assert found.met is None
    again = run(tmp_path / "search" / "winner" / "recipe.yaml", folder=tmp_path / "again")
    assert isinstance(again, attar.evaluation.Verdict)
    assert found.verdict is not None
    assert again.headline == found.verdict.headline
    assert weights(tmp_path / "again" / "student") == weights(
        tmp_path / "search" / "winner" / "student"
    )


def test_the_teacher_is_asked_once_for_all_trials(write: Write, tmp_path: Path) -> None:
    path = write("batch_size: 32}\n", "batch_size: 32}\n  cache: true\n", "trials: 4", "trials: 2")
    counted = []
    forward = attar.teachers.Teacher.__call__

    def call(self: Any, batch: Any) -> Any:
        counted.append(len(batch["ids"]))
        return forward(self, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attar.teachers.Teacher, "__call__", call)
        search(path, folder=tmp_path / "runs" / "search")
    once = list((tmp_path / "runs" / "cache").iterdir())
    assert len([each for each in once if each.is_dir()]) == 1
    assert sum(counted) < 2 * 970  # and 2 trials of 2 epochs would ask 4 times 970, and a winner


# ---------------------------------------------------------------- trials that do not end well


def test_a_hopeless_trial_is_stopped_and_a_run_without_pruner_stops_none(
    write: Write, tmp_path: Path
) -> None:
    text = "stages.0.optimizer.lr: [0.02, 0.021, 0.022, 0.023, 0.0000001]"
    changes = ["student.widths: [[2], [8], [24], [48]]", text, "trials: 4", "trials: 5"]
    changes += ["epochs: 2\n", "epochs: 3\n", "widths: [8]}", "widths: [32]}"]
    seed = next(seed for seed in range(99) if last_of_the_grid(5, seed) == 4)
    seeded = f"seed={seed}"
    stopped = search(write(*changes), folder=tmp_path / "goal", overrides=[seeded])
    assert [trial.state for trial in stopped.trials] == ["finished"] * 4 + ["stopped"]
    last = stopped.trials[-1]
    assert last.chosen == {"stages.0.optimizer.lr": 0.0000001}
    assert last.why == "stopped after epoch 2 of 3"
    assert last.cost is None
    log = (tmp_path / "goal" / "trials" / "4" / "metrics.jsonl").read_text().splitlines()
    assert sum(json.loads(line)["split"] == "validation" for line in log) == 2
    all_of_it = [seeded, "search.pruner=none"]
    whole = search(write(*changes), folder=tmp_path / "none", overrides=all_of_it)
    assert [trial.state for trial in whole.trials] == ["finished"] * 5


def last_of_the_grid(count: int, seed: int) -> int:
    """Which of *count* values a grid of this seed tries last."""
    from optuna.samplers import GridSampler

    return int(GridSampler({"a": list(range(count))}, seed=seed)._all_grids[-1][0])


def test_the_pruner_compares_with_those_that_met_the_goal() -> None:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(pruner=search_study._below_the_goal(1))

    def stopped(*curve: float, miss: float = -0.1) -> bool:
        """Lower is better, as the size that the study is about."""

        def objective(trial: Any) -> float:
            for step, value in enumerate(curve):
                trial.report(value, step)
                if trial.should_prune():
                    raise optuna.TrialPruned
            trial.set_constraint("retain", miss)
            return 1.0

        study.optimize(objective, n_trials=1)
        return study.trials[-1].state is optuna.trial.TrialState.PRUNED

    for middle in (0.5, 0.4, 0.6):
        assert not stopped(0.9, middle, 0.2)
        assert not stopped(0.9, 0.9, 0.9, miss=0.5)  # and what missed the goal is no measure
    assert not stopped(1.99, 1.95, 1.94, miss=0.5)  # three are too few
    assert not stopped(0.9, 0.7, 0.2)
    assert stopped(1.2, 1.01, 0.1)  # 0.7, and as much more as the others differ by
    assert not stopped(1.2, 0.99, 0.2, miss=0.5)
    assert not stopped(0.99, 1.2, 0.2)  # has been as good
    assert stopped(0.99, 0.7, 0.21)  # by then they do not differ


def test_a_student_that_keeps_enough_already_is_not_stopped(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import optuna

    monkeypatch.setattr(optuna.Trial, "should_prune", lambda self: True)
    path = write("{retain: 0.8}", "{retain: 0.01}", "trials: 4", "trials: 1")
    assert search(path, folder=tmp_path / "kept").trials[0].finished
    path = write("{retain: 0.8}", "{retain: 1.0}", "trials: 4", "trials: 1")
    assert search(path, folder=tmp_path / "not").trials[0].state == "stopped"


def test_a_diverged_student_is_a_failed_trial_and_the_search_goes_on(
    write: Write, tmp_path: Path
) -> None:
    changes = ["student.widths: [[2], [8], [24], [48]]", "stages.0.optimizer.lr: [1.0e38, 0.01]"]
    found = search(write(*changes), folder=tmp_path / "search")
    assert sorted(trial.state for trial in found.trials) == ["failed", "finished"]
    failed = next(trial for trial in found.trials if trial.state == "failed")
    assert failed.why is not None
    assert "finite" in failed.why
    assert not (tmp_path / "search" / "trials" / str(failed.number) / "checkpoints").exists()


def test_values_that_only_together_make_no_student_are_a_failed_trial(
    write: Write, tmp_path: Path
) -> None:
    plain = "optimizer: {name: adamw, lr: 0.01}"
    sgd = "optimizer: {name: sgd, lr: 0.05, momentum: 0.9, nesterov: false}"
    space = (
        "stages.0.optimizer.momentum: [0.9, 0.0]\n    stages.0.optimizer.nesterov: [false, true]"
    )
    path = write("student.widths: [[2], [8], [24], [48]]", space, plain, sgd)
    found = search(path, folder=tmp_path / "search")
    states = {tuple(trial.chosen.values()): trial.state for trial in found.trials}
    assert states == {
        (0.9, False): "finished",
        (0.9, True): "finished",
        (0.0, False): "finished",
        (0.0, True): "failed",
    }


def test_a_student_that_was_tried_is_not_trained_again(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = sys.modules["attar.recipes.search"]
    trained = []
    tried = module.tried  # type: ignore[attr-defined]

    def counted(desk: Any, loaded: Any, *more: Any) -> Any:
        trained.append(loaded.full["student"]["widths"])
        return tried(desk, loaded, *more)

    monkeypatch.setattr(module, "tried", counted)
    monkeypatch.setattr(Space, "size", None)  # else a space so small is tried whole
    changes = ["[[2], [8], [24], [48]]", "[[8], [24]]", "trials: 4", "trials: 5\n  sampler: random"]
    found = search(write(*changes), folder=tmp_path / "search")
    assert len(found.trials) == 5
    assert len(trained) == 2
    for trial in found.trials:
        if trial.same_as is not None:
            first = found.trials[trial.same_as]
            assert (trial.score, trial.cost) == (first.score, first.cost)
    assert sum(trial.same_as is None for trial in found.trials) == 2
    assert "3 of the same values again" in found.headline


def test_where_students_can_be_counted_a_repetition_is_none_of_the_trials(
    write: Write, tmp_path: Path
) -> None:
    space = Space({"student.widths.0": [1, 2, 3], "stages.0.epochs": Range(1, 2)})
    (study,) = studies(write, tmp_path, "one")
    study._sampler = "random"
    tried: list[tuple[int, int]] = []

    def objective(trial: Any) -> float:
        tried.append(tuple(space.suggested(trial).values()))  # type: ignore[arg-type]
        return 1.0

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        while study.next(space, 5, objective):
            pass
    assert len(set(tried)) == 5 < len(tried)
    repeated = [number for number, one in enumerate(tried) if one in tried[:number]]
    assert all(tried[number + 1] not in tried[: number + 1] for number in repeated)


# ---------------------------------------------------------------- going on


def test_a_search_that_broke_off_keeps_what_is_finished_and_does_the_rest(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, folder = write(*RANGE), tmp_path / "search"
    whole = search(path, folder=tmp_path / "whole")
    module = sys.modules["attar.recipes.search"]
    tried, calls = module.tried, []  # type: ignore[attr-defined]

    def broken(*words: Any) -> Any:
        calls.append(words)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return tried(*words)

    monkeypatch.setattr(module, "tried", broken)
    with pytest.raises(KeyboardInterrupt):
        search(path, folder=folder)
    before = read_json(folder / "search.json")["trials"]
    assert [trial["number"] for trial in before] == [0, 1]
    with pytest.raises(RunExistsError):
        search(path, folder=folder)
    found = search(path, folder=folder, resume=True)
    assert [json.loads(json.dumps(trial.to_json())) for trial in found.trials[:2]] == before
    assert len(found.trials) == 4
    assert len(calls) == 3 + 2
    first, second = ([t.chosen for t in each.trials[:2]] for each in (whole, found))
    assert first == second  # the seed says which
    cut = found.trials[2]
    assert cut.number == 3
    assert cut.chosen == whole.trials[2].chosen  # what was cut off is done again


def test_a_finished_search_takes_no_more_trials_and_tells_the_same_again(
    write: Write, tmp_path: Path
) -> None:
    path, folder = write(*RANGE, "trials: 4", "trials: 2"), tmp_path / "search"
    found = search(path, folder=folder)
    again = search(path, folder=folder, resume=True)
    assert again.trials == found.trials
    assert again.winner == found.winner
    if found.winner is not None:
        with pytest.raises(PreflightError, match="asked about its winner"):
            search(path, folder=folder, resume=True, trials=3)


def test_more_trials_are_had_where_nobody_has_won_yet(write: Write, tmp_path: Path) -> None:
    path = write(*RANGE, "{retain: 0.8}", "{retain: 0.8, macs: 10}", "trials: 4", "trials: 1")
    assert len(search(path, folder=tmp_path / "search").trials) == 1
    assert len(search(path, folder=tmp_path / "search", resume=True, trials=3).trials) == 3


def test_a_changed_recipe_on_one_storage_is_refused_and_says_what_changed(
    write: Write, tmp_path: Path
) -> None:
    url = f"sqlite:///{tmp_path / 'shared.db'}"
    search(write("trials: 4", "trials: 1"), folder=tmp_path / "one", storage=url)
    changed = write("trials: 4", "trials: 1", "temperature: 4.0", "temperature: 2.0")
    said = "holds the trials of another recipe called recipe: stages.0.terms.0.loss.temperature was"
    with pytest.raises(PreflightError, match=f"{said} 4.0 there and is 2.0 now"):
        search(changed, folder=tmp_path / "two", storage=url)
    assert not (tmp_path / "two").exists()
    other = write("trials: 4", "trials: 1", "temperature: 4.0", "temperature: 2.0", name="other")
    assert len(search(other, folder=tmp_path / "three", storage=url).trials) == 1
    with pytest.raises(PreflightError, match="temperature was"):
        search(changed, folder=tmp_path / "one", resume=True)


def test_another_teacher_on_one_storage_is_refused(write: Write, tmp_path: Path) -> None:
    teacher = tmp_path / "teacher"
    task = attar.tasks.ImageClassification(classes=10)
    data, _ = attar.data.digits()

    def trained(seed: int) -> None:
        torch.manual_seed(seed)
        model = attar.models.build("mlp", data=data, widths=[64])
        attar.train(model, data, task, epochs=2, batch_size=32)
        attar.models.save(model, teacher, extra={"task": task.fitted(data).describe()})

    trained(0)
    old = RECIPE[RECIPE.index("teacher:") : RECIPE.index("student:")]
    path = write(old, f"teacher: {{load: {teacher}}}\n", "trials: 4", "trials: 1")
    url = f"sqlite:///{tmp_path / 'shared.db'}"
    search(path, folder=tmp_path / "one", storage=url)
    for file in sorted(teacher.iterdir()):
        file.unlink()
    teacher.rmdir()
    trained(1)
    with pytest.raises(PreflightError, match="its trials are of another teacher"):
        search(path, folder=tmp_path / "two", storage=url, trials=1)


def test_two_processes_share_one_storage(write: Write, tmp_path: Path) -> None:
    """Each takes trials, together as many as were asked for, and one of them judges the winner."""
    write(*RANGE, "trials: 4", "trials: 8")
    url = f"sqlite:///{tmp_path / 'shared.db'}"
    words = [sys.executable, "-m", "attar", "search", "recipe.yaml", "--storage", url, "--run"]
    workers = [
        subprocess.Popen(
            [*words, name], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for name in ("one", "two")
    ]
    ends = [worker.communicate(timeout=300) for worker in workers]
    for worker, (_, err) in zip(workers, ends, strict=True):
        assert worker.returncode in (0, 1), err
        assert err == ""
    counts = [out.count("\ntrial ") for out, _ in ends]
    assert all(counts)
    assert 8 <= sum(counts) <= 9  # both may begin the last at the same time
    winners = [name for name in ("one", "two") if (tmp_path / name / "winner").exists()]
    assert len(winners) == 1
    told = [read_json(tmp_path / name / "search.json") for name in ("one", "two")]
    assert max(len(each["trials"]) for each in told) == sum(counts)


def studies(write: Write, tmp_path: Path, *names: str) -> list[Study]:
    """A study of one recipe in one storage, as seen from several run folders."""
    loaded = load_recipe(write(*RANGE))
    assert loaded.recipe.search is not None
    found = []
    for name in names:
        place = tmp_path / name
        place.mkdir()
        url = f"sqlite:///{tmp_path / 'shared.db'}"
        aims = Aims(goal=True, higher_is_better=True)
        found.append(Study(place, loaded, loaded.recipe.search, aims, url))
    return found


def test_one_machine_alone_may_ask_about_the_winner(write: Write, tmp_path: Path) -> None:
    one, two = studies(write, tmp_path, "one", "two")
    assert one.claimed() is None
    assert one.claim(3) is None
    told = two.claim(3)
    assert told is not None
    assert told.endswith("one")
    assert one.claim(3) is None  # and again, after a kill


def test_the_trial_of_a_machine_that_is_silent_is_done_by_another(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search_study, "SILENCE", 1)
    one, two = studies(write, tmp_path, "one", "two")
    space = Space({"student.widths.0": Range(2, 60)})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dead = one._study.ask()
    chosen = space.suggested(dead)
    one._storage.record_heartbeat(dead._trial_id)
    tried = []

    def objective(trial: Any) -> float:
        tried.append(space.suggested(trial))
        return 1.0

    assert not two.next(space, 1, objective)  # it may still be at work
    time.sleep(2.5)
    assert two.next(space, 1, objective)
    assert tried == [chosen]
    assert not two.next(space, 1, objective)
    assert two.cut() == 1


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("space", "said"),
    [
        ("student.widht: [8]", r"recipe:20:5: student.widht=8: there is no 'widht' here; did you"),
        ("teacher.model.widths: [[8]]", "cannot be searched: all trials share one teacher"),
        ("data.seed: [1, 2]", "all trials share the data and what the teacher says of them"),
        ("task.classes: [10]", "all trials share the task"),
        ("examples: [50]", "all trials share the data"),
        ("seed: [1, 2]", "the luckiest, not the best"),
        ("goal.retain: [0.5]", "all trials share the goal"),
        ("stages.0.views: [2]", "of the same pixels; leave it out of the space$"),
        ("stages.0.augment: [[]]", "of the same pixels; .* or set teacher.cache: false"),
        ("stagez.0.epochs: [2]", "there is no 'stagez'; did you mean 'stages'"),
        ("stages.7.epochs: [2]", "the recipe has no 'stages.7'"),
        ("stages.0.epochs: [2, 2.5]", "stages.0.epochs=2.5: epochs is 2.5: it must be"),
        ("stages.0.epochs: [1, true]", "stages.0.epochs=true: epochs is True"),
        ("stages.0.epochs: {low: 1.5, high: 3}", "stages.0.epochs=1.5"),
        ("stages.0.label_weight: {low: -1.0, high: 1.0}", "greater than or equal to 0"),
        ("stages.0.epochs: {low: 3, high: 3}", "low must be below high"),
        ("stages.0.epochs: {lo: 3, high: 4}", "there is no 'lo' here; did you mean 'low'"),
        ("stages.0.epochs: {low: 3}", "'high' is missing"),
        ("stages.0.epochs: {low: true, high: 4}", "low of stages.0.epochs is True"),
        ("stages.0.epochs: {low: 0, high: 4, log: true}", "low must be above 0"),
        ("stages.0.epochs: {low: 1, high: 4, log: true, step: 1}", "is logarithmic; leave one"),
        ("stages.0.epochs: {low: 1, high: 4, step: 5}", "it must be above 0 and at most 3"),
        ("stages.0.epochs: 3", "give a list of values"),
        ("stages.0.epochs: []", "give it one value or more"),
        ("stages.0.epochs: [2, 2]", "2 stands twice"),
        ("student: [mlp, {name: resnet, depth: 9}]", "student={.*}: resnet: depth must be"),
        ("stages.0.terms.0.loss.name: [klx]", "there is no 'klx' in losses"),
    ],
)
def test_a_wrong_space_is_refused_before_anything_is_trained(
    space: str, said: str, tmp_path: Path
) -> None:
    text = RECIPE.replace("student.widths: [[2], [8], [24], [48]]", space)
    text = text.replace("batch_size: 32}\n", "batch_size: 32}\n  cache: true\n")
    with pytest.raises(PreflightError, match=said):
        search(parse(text), folder=tmp_path / "search")
    assert not (tmp_path / "search").exists()
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(PreflightError, match=said.replace("recipe:", ".*wrong.yaml:")):
        check(path)


def test_check_tells_the_space(write: Write) -> None:
    told = check(write())["search"]
    assert told == {"trials": 4, "told": "student.widths: 4 students, each is tried once"}


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("search=null", "says nothing of a search"),
        ("search.space={}", "space is empty"),
        ("student=[mlp]", "a search tries one at a time"),
        ("search.sampler=gird", "it must be 'tpe', 'random', 'grid' or 'nsga'"),
        ("search={space: {stages.0.label_weight: {low: 0, high: 0.5}}, sampler: grid}", "counted"),
        ("search={space: {stages.0.epochs: [1]}, sampler: nsga, pruner: median}", "several"),
        ("goal=null", None),
        ("search.trials=0", "greater than or equal to 1"),
        ("goal.size_mb=0", "size_mb is 0: it must be greater than 0"),
        ("goal.size=3", "did you mean 'size_mb'"),
        ("search.storage=foo", "storage is no URL"),
        ("search.storage=sqlite:////nowhere/x.db", "the trials cannot be kept there"),
    ],
)
def test_a_wrong_search_is_refused(
    override: str, said: str | None, write: Write, tmp_path: Path
) -> None:
    overrides = [override]
    if said is None:
        overrides, said = [override, "search.pruner=goal"], "pruner is goal, and the recipe has"
    with pytest.raises(PreflightError, match=said):
        search(write(), folder=tmp_path / "search", overrides=overrides)
    assert not (tmp_path / "search").exists()


def test_a_password_is_neither_told_nor_written(write: Write, tmp_path: Path) -> None:
    url = "postgresql+nodriver://me:verysecret@nowhere/db"
    with pytest.raises(PreflightError) as raised:
        search(write(), folder=tmp_path / "one", storage=url)
    assert "verysecret" not in str(raised.value)
    secret = f"sqlite:///{tmp_path}/verysecret.db"
    path = write("trials: 4", f"trials: 1\n  storage: '{secret}'")
    search(path, folder=tmp_path / "two")
    for file in (tmp_path / "two").rglob("*"):
        if file.is_file():
            assert b"verysecret" not in file.read_bytes(), file


def test_a_recipe_of_objects_has_no_paths(write: Write) -> None:
    with pytest.raises(UsageError, match="paths in a recipe's text"):
        search(load_recipe(write()).recipe)  # type: ignore[arg-type]


# ---------------------------------------------------------------- parts


def trial(number: int, score: float, size: float, ms: float = 1.0, **more: Any) -> Trial:
    cost = {"parameters": 1, "macs": 1, "bytes": size, "latency_ms": ms}
    return Trial(number, {"a": number}, "finished", score, score, cost, **more)


def test_the_winner_is_the_smallest_that_meets_the_goal_else_the_closest_is_named() -> None:
    met, missed = {"retain": -0.1}, {"retain": 0.05, "size_mb": -0.5}
    far = {"retain": -0.5, "size_mb": 0.3}
    tried = [
        trial(0, 0.9, 300, misses=met),
        trial(1, 0.8, 200, misses=met),
        trial(2, 0.85, 200, misses=met),
        trial(3, 0.7, 100, misses=missed),
    ]
    winner = winner_of(tried, goal=True)
    assert winner is tried[2]
    assert winner_of(tried, goal=True, higher_is_better=False) is tried[1]
    assert winner_of(tried[3:], goal=True) is None
    assert closest_of([trial(0, 0.9, 9, misses=far), *tried[3:]]) is tried[3]
    without = [trial(0, 0.9, 300), trial(1, 0.95, 400), trial(2, 0.95, 350)]
    assert winner_of(without, goal=False) is without[2]
    assert winner_of(without, goal=False, higher_is_better=False) is without[0]
    assert winner_of([Trial(0, {}, "stopped", 0.9)], goal=False) is None


def test_the_front_is_of_those_that_no_other_beats_in_both() -> None:
    tried = [
        trial(0, 0.9, 300, 1.0),
        trial(1, 0.8, 200, 1.02),
        trial(2, 0.7, 250, 0.5),
        trial(3, 0.9, 300, 1.0, same_as=0),
        Trial(4, {}, "stopped", 0.99),
    ]
    assert fronts_of(tried, higher_is_better=True) == {"size": [0, 1], "latency": [0, 2]}
    assert fronts_of(tried, higher_is_better=False) == {"size": [1, 2], "latency": [2]}


def test_a_space_is_counted_and_whole_numbers_stay_whole() -> None:
    space = Space({"a": [1, "x", [2]], "b": Range(2, 9, step=3), "c": Range(0.0, 0.5, step=0.25)})
    assert space.size == 3 * 3 * 3
    assert space.grid() == {"a": [1, "x", "[2]"], "b": [2, 5, 8], "c": [0.0, 0.25, 0.5]}
    assert Space({"a": Range(1.0, 2.0)}).size is None
    assert Space({"a": Range(1, 4)}).size == 4
    assert [Range(1, 4).whole, Range(1, 4.0).whole, Range(1, 4, step=0.5).whole] == [
        True,
        False,
        False,
    ]
    document = parse("search: {space: {stages.0.epochs: {low: 1, high: 6, step: 2}}}")
    found = space_of(document, Search(space=document.value["search"]["space"]), cached=False)
    assert found.corners() == [("stages.0.epochs", 1), ("stages.0.epochs", 5)]


def test_paths_are_told_by_their_ends() -> None:
    paths = ["student.widths.0", "stages.0.terms.0.weight", "stages.1.terms.0.weight", "student"]
    assert short(paths) == ["widths.0", "0.terms.0.weight", "1.terms.0.weight", "student"]


def test_nsga_looks_for_the_front_and_ends_with_the_smallest_too(
    write: Write, tmp_path: Path
) -> None:
    found = search(
        write(*RANGE), folder=tmp_path / "search", overrides=["search.sampler=nsga"], trials=3
    )
    assert len(found.trials) == 3
    meeting = [t.cost["bytes"] for t in found.trials if t.met and t.cost]
    if meeting:
        assert found.winner is not None
        assert found.winner.cost is not None
        assert found.winner.cost["bytes"] == min(meeting)


# ---------------------------------------------------------------- the page


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Found:
    folder = tmp_path_factory.mktemp("page")
    (folder / "recipe.yaml").write_text(RECIPE)
    return search(folder / "recipe.yaml", folder=folder / "search", overrides=["seeds=1"])


def test_the_page_shows_every_trial_the_front_and_the_way_to_the_winner(done: Found) -> None:
    text = (done.folder / "report.html").read_text()
    assert done.winner is not None
    for each in done.trials:
        assert f'<th scope="row">{each.number}' in text
    command = read_json(done.folder / "search.json")["winner"]["command"]
    widths = done.winner.chosen["student.widths"]
    assert shlex.split(command)[:2] == ["attar", "run"]
    assert shlex.split(command)[3:] == ["seeds=1", f"student.widths={widths}"]
    assert html.escape(command, quote=True).replace("&#x27;", "&#39;") in text
    assert "figure-search-size" in text
    assert "figure-search-latency" in text
    assert text.count(", the winner</text>") == 2
    assert "<script" not in text
    written = (done.folder / "report.html").read_bytes()
    assert page(done.folder).read_bytes() == written  # from what lies there alone


def test_a_broken_search_is_told_as_such(done: Found, tmp_path: Path) -> None:
    (tmp_path / "search.json").write_text('{"format": "attar-search/1"}')
    with pytest.raises(DataError, match="does not hold what a search"):
        page(tmp_path)
    (tmp_path / "search.json").write_text('{"format": "attar-search/2"}')
    with pytest.raises(DataError, match="is not a search of the format"):
        page(tmp_path)


def test_attar_run_of_the_recipe_says_that_the_search_is_left_out(
    write: Write, tmp_path: Path
) -> None:
    said: list[str] = []
    run(write(), folder=tmp_path / "run", say=said.append)
    assert "search     is left out: this is the recipe as it stands; attar search does it" in said
