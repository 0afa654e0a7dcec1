"""Folders of images: what is read, to which bytes, and what is refused."""

from __future__ import annotations

import json
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from attar.data import DatasetSource, TensorSource, decoding, images
from attar.runtime import DataError, UsageError

Image = pytest.importorskip("PIL.Image")


def _pixels(seed: int, height: int = 12, width: int = 12, channels: int = 3) -> np.ndarray:
    generator = np.random.default_rng(seed)
    shape = (height, width, channels) if channels > 1 else (height, width)
    return generator.integers(0, 256, shape, np.uint8)


def _save(path: Path, array: np.ndarray, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def _tree(root: Path, parts: tuple[str, ...] = ("train", "test"), count: int = 5) -> Path:
    for p, part in enumerate(parts):
        for c, label in enumerate(("cat", "dog")):
            for i in range(count):
                seed = 100 * p + 10 * c + i
                _save(root / part / label / f"{i}.png", _pixels(seed))
    return root


def _all(source) -> torch.Tensor:
    return source.rows(torch.arange(len(source)))["inputs"]


def _lazy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "_MOST_BYTES", 0)


def test_rows_are_the_pixels_in_order_of_class_and_name(tmp_path: Path) -> None:
    train, test = images(folder=str(_tree(tmp_path)))
    assert (len(train), len(test), train.shape) == (10, 10, (3, 12, 12))
    assert train.classes == test.classes == ("cat", "dog")
    assert train.labels.tolist() == [0] * 5 + [1] * 5
    expected = torch.from_numpy(_pixels(113)).permute(2, 0, 1) / 255
    assert torch.equal(_all(test)[8], expected)


def test_a_validation_folder_becomes_the_part_between(tmp_path: Path) -> None:
    splits = images(folder=str(_tree(tmp_path, ("train", "test", "val"))))
    train, validation, test = splits
    assert (splits.train, splits.validation, splits.test) == (train, validation, test)
    assert torch.equal(_all(validation)[0] * 255, torch.from_numpy(_pixels(200)).permute(2, 0, 1))
    assert torch.equal(_all(test)[0] * 255, torch.from_numpy(_pixels(100)).permute(2, 0, 1))


def test_without_a_test_folder_a_fifth_of_each_class_is_carved_by_seed(tmp_path: Path) -> None:
    root = str(_tree(tmp_path, (".",), count=10))
    train, test = images(folder=root)
    assert test.labels.bincount().tolist() == [2, 2]
    assert train.labels.bincount().tolist() == [8, 8]
    assert torch.equal(_all(test), _all(images(folder=root).test))
    assert not torch.equal(_all(test), _all(images(folder=root, seed=1).test))


def test_the_test_part_may_be_another_folder(tmp_path: Path) -> None:
    _tree(tmp_path, ("a", "b", "test"))
    train, test = images(folder=str(tmp_path / "a"), test=str(tmp_path / "b"))
    assert (len(train), len(test)) == (10, 10)
    (tmp_path / "a").rename(tmp_path / "train")
    (tmp_path / "b").rename(tmp_path / "validation")
    with pytest.raises(UsageError, match="has a folder test already"):
        images(folder=str(tmp_path), test=str(tmp_path / "validation"))


@pytest.mark.parametrize("workers", [0, 2])
def test_read_on_demand_or_at_once_the_bytes_are_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    root = tmp_path / "photos"
    for label in ("a", "b"):
        for i in range(6):
            side = 40 + 7 * i
            _save(root / label / f"{i}.jpg", _pixels(i, side, side + 9), quality=80)
    whole = images(folder=str(root), size=16, workers=workers).train
    _lazy(monkeypatch)
    train, test = images(folder=str(root), size=16, workers=workers)
    assert isinstance(whole._source, TensorSource)
    assert isinstance(train._source, DatasetSource)
    assert torch.equal(_all(whole), _all(train))
    assert whole.fingerprint() == train.fingerprint()
    order = [batch["inputs"] for batch in train.epoch(0, batch_size=3, seed=1)]
    again = [batch["inputs"] for batch in whole.epoch(0, batch_size=3, seed=1)]
    assert torch.equal(torch.cat(order), torch.cat(again))
    assert train.workers == test.workers == workers


def test_threads_change_no_byte_and_no_order(tmp_path: Path) -> None:
    root = str(_tree(tmp_path, count=30))
    one, many = (images(folder=root, workers=n).train.fingerprint() for n in (0, 3))
    assert one == many


def test_grey_images_have_one_channel_and_one_colour_image_makes_it_three(tmp_path: Path) -> None:
    for part in ("train", "test"):
        for label in "ab":
            _save(tmp_path / part / label / "0.png", _pixels(1, channels=1))
    grey = images(folder=str(tmp_path)).train
    assert grey.shape == (1, 12, 12)
    assert torch.equal(_all(grey)[0, 0] * 255, torch.from_numpy(_pixels(1, channels=1)).float())
    _save(tmp_path / "test" / "b" / "1.png", _pixels(2))
    colour = images(folder=str(tmp_path)).train
    assert torch.equal(_all(colour), _all(grey).expand(-1, 3, -1, -1))


def _pair(root: Path, name: str, image, **options: object) -> torch.Tensor:
    """What the reader makes of ``image``; bytes [3, H, W]."""
    for label in ("a", "b"):
        path = root / "train" / label / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, **options)
        _save(root / "test" / label / "0.png", _pixels(0, image.height, image.width))
    return _all(images(folder=str(root), test_fraction=0.5).train)[0] * 255


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "ppm", "webp"])
def test_every_lossless_format_gives_its_pixels(tmp_path: Path, suffix: str) -> None:
    options = {"lossless": True} if suffix == "webp" else {}
    found = _pair(tmp_path, f"x.{suffix}", Image.fromarray(_pixels(3)), **options)
    assert torch.equal(found, torch.from_numpy(_pixels(3)).permute(2, 0, 1).float())


def test_transparency_is_dropped_and_palettes_are_looked_up(tmp_path: Path) -> None:
    image = Image.new("P", (4, 4))
    image.putpalette([0, 0, 0, 250, 120, 10] + [0] * 762)
    image.putdata([1] * 16)
    found = _pair(tmp_path, "x.png", image, transparency=bytes([255, 0]))
    assert found[:, 0, 0].tolist() == [250, 120, 10]
    rgba = Image.fromarray(np.full((4, 4, 4), 7, np.uint8))
    assert torch.equal(_pair(tmp_path / "b", "x.png", rgba), torch.full((3, 4, 4), 7.0))


def test_of_sixteen_bits_the_upper_eight_are_kept(tmp_path: Path) -> None:
    values = np.arange(16, dtype=np.uint16).reshape(4, 4) * 4096 + 77
    found = _pair(tmp_path, "x.png", Image.fromarray(values))
    assert torch.equal(found[0], torch.from_numpy((values >> 8).astype(np.float32)))
    big = Image.fromarray(values.astype(">u2"))
    assert torch.equal(_pair(tmp_path / "tif", "x.tif", big), found)


def test_a_cmyk_photo_is_red_where_it_is_red(tmp_path: Path) -> None:
    ink = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    red, green, blue = _pair(tmp_path, "x.jpg", ink, quality=95).mean((1, 2)).tolist()
    assert red > 230
    assert max(green, blue) < 40


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_are_turned_upright(tmp_path: Path, orientation: int) -> None:
    array = np.zeros((16, 32, 3), np.uint8)
    array[:8, :8] = 255
    back = [
        lambda a: a,
        lambda a: a[:, ::-1],
        lambda a: a[::-1, ::-1],
        lambda a: a[::-1],
        lambda a: a.transpose(1, 0, 2),
        lambda a: np.rot90(a),
        lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        lambda a: np.rot90(a, -1),
    ][orientation - 1]
    exif = Image.Exif()
    exif[0x0112] = orientation
    for label in ("a", "b"):
        stored = np.ascontiguousarray(back(array))
        _save(tmp_path / "train" / label / "x.jpg", stored, exif=exif, quality=95)
        _save(tmp_path / "test" / label / "x.png", array)
    found = (_all(images(folder=str(tmp_path)).train)[0, 0] > 0.5).numpy()
    assert np.array_equal(found, array[..., 0] > 0)


def test_size_is_a_resized_shorter_side_and_a_centre_crop(tmp_path: Path) -> None:
    wide = _pixels(5, 20, 60)
    tall = np.ascontiguousarray(wide.transpose(1, 0, 2))
    for label in ("a", "b"):
        _save(tmp_path / "train" / label / "tall.png", tall)
        _save(tmp_path / "train" / label / "wide.png", wide)
        _save(tmp_path / "test" / label / "small.png", np.full((5, 7, 3), 90, np.uint8))
    train, test = images(folder=str(tmp_path), size=10)
    assert train.shape == test.shape == (3, 10, 10)
    resized = Image.fromarray(wide).resize((30, 10), Image.Resampling.BILINEAR)
    expected = torch.from_numpy(np.array(resized.crop((10, 0, 20, 10)))).permute(2, 0, 1).float()
    assert torch.equal(_all(train)[1] * 255, expected)
    assert torch.equal(_all(train)[0] * 255, expected.transpose(1, 2))
    assert torch.equal(_all(test) * 255, torch.full((2, 3, 10, 10), 90.0))


def test_a_large_jpeg_is_resized_to_what_a_full_decoding_gives(tmp_path: Path) -> None:
    waves = 128 + 100 * np.sin(np.arange(640) * 2 * np.pi / 48)
    photo = np.stack([np.tile(waves.astype(np.uint8), (480, 1))] * 3, 2)
    for label in ("a", "b"):
        _save(tmp_path / label / "0.jpg", photo, quality=95)
        _save(tmp_path / label / "1.png", photo)
    train, test = images(folder=str(tmp_path), size=64, test_fraction=0.5)
    both = torch.cat([_all(train), _all(test)]) * 255
    assert both.std() > 60
    assert (both - both[0]).abs().max() <= 3


def test_images_of_other_sizes_are_named_and_counted(tmp_path: Path) -> None:
    _tree(tmp_path)
    _save(tmp_path / "train" / "dog" / "3.png", _pixels(0, 12, 14))
    _save(tmp_path / "test" / "cat" / "1.png", _pixels(0, 10, 12))
    others = r"dog/3\.png \(12 x 14\), cat/1\.png \(10 x 12\); give size: 64"
    said = rf"2 of 20 images are not 12 x 12 as cat/0\.png is, .*: {others}"
    with pytest.raises(DataError, match=said):
        images(folder=str(tmp_path))


def _claims(width: int, height: int) -> bytes:
    """A PNG whose header claims a size, and that has almost no pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0" * 100)
    parts = [chunk(b"IHDR", head), chunk(b"IDAT", pixels), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_all_files_that_are_no_images_are_named_at_once(tmp_path: Path) -> None:
    cat = _tree(tmp_path) / "train" / "cat"
    (cat / "text.png").write_text("not a picture\n" * 9)
    (cat / "empty.jpg").write_bytes(b"")
    (cat / "bomb.png").write_bytes(_claims(100_000, 100_000))
    (cat / "wide.png").write_bytes(_claims(10_000, 9_000))
    (cat / "cut.jpg").write_bytes(b"\xff\xd8\xff\xe0\x00")
    Image.fromarray(np.ones((4, 4), np.float32)).save(cat / "f.tiff")
    (cat / "more").mkdir()
    with pytest.raises(DataError, match="7 files are no images") as error:
        images(folder=str(tmp_path))
    said = str(error.value)
    for name in ("text.png (not an image)", "empty.jpg (empty file)", "cut.jpg", "f.tiff"):
        assert f"cat/{name}" in said
    assert "bomb.png (more than 89,478,485 pixels)" in said
    assert "wide.png (10,000 x 9,000 is more" in said
    assert "cat/more (a folder)" in said


def test_at_most_eight_files_are_named(tmp_path: Path) -> None:
    dog = _tree(tmp_path) / "train" / "dog"
    for i in range(20):
        (dog / f"bad{i:02}.png").write_text("x")
    with pytest.raises(DataError, match=r"20 files.*bad07\.png \(not an image\) and 12 more"):
        images(folder=str(tmp_path))


@pytest.mark.parametrize("lazily", [False, True])
def test_a_photo_cut_in_its_pixels_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lazily: bool
) -> None:
    _tree(tmp_path)
    whole = _save(tmp_path / "train" / "dog" / "9.jpg", _pixels(1, 12, 12), quality=95)
    whole.write_bytes(whole.read_bytes()[:-120])
    if lazily:
        _lazy(monkeypatch)
    with pytest.raises(DataError, match=r"dog/9\.jpg: cannot be decoded \(.*truncated"):
        _all(images(folder=str(tmp_path)).train)


def test_classes_that_differ_are_named(tmp_path: Path) -> None:
    _tree(tmp_path)
    (tmp_path / "test" / "dog").rename(tmp_path / "test" / "Dog")
    with pytest.raises(DataError, match=r"test: its classes .* lacks dog and has Dog besides"):
        images(folder=str(tmp_path))


def test_an_empty_class_is_named(tmp_path: Path) -> None:
    _tree(tmp_path)
    (tmp_path / "train" / "eel").mkdir()
    (tmp_path / "train" / "eel" / ".hidden.png").write_bytes(b"")
    with pytest.raises(DataError, match="class 'eel' has no image"):
        images(folder=str(tmp_path))


def test_hidden_files_and_litter_are_ignored(tmp_path: Path) -> None:
    _tree(tmp_path)
    for place in (tmp_path, tmp_path / "train", tmp_path / "train" / "cat"):
        (place / ".DS_Store").write_bytes(b"x")
        (place / "Thumbs.db").write_bytes(b"x")
        (place / ".git").mkdir()
    (tmp_path / "README.md").write_text("x")
    assert len(images(folder=str(tmp_path)).train) == 10


def test_links_may_lead_within_the_folder_only(tmp_path: Path) -> None:
    root = _tree(tmp_path / "photos")
    outside = _save(tmp_path / "secret.png", _pixels(0))
    link = root / "train" / "cat" / "link.png"
    link.symlink_to(root / "test" / "cat" / "0.png")
    assert len(images(folder=str(root)).train) == 11
    link.unlink()
    link.symlink_to(outside)
    with pytest.raises(DataError, match=r"cat/link\.png \(a link that leads out"):
        images(folder=str(root))
    link.unlink()
    link.symlink_to(root / "nothing.png")
    with pytest.raises(DataError, match=r"cat/link\.png \(no file"):
        images(folder=str(root))
    link.unlink()
    (root / "test" / "dog").rename(tmp_path / "dog")
    (root / "test" / "dog").symlink_to(tmp_path / "dog")
    with pytest.raises(DataError, match=r"dog \(a link that leads out"):
        images(folder=str(root))
    (root / "test").rename(tmp_path / "test")
    (root / "test").symlink_to(tmp_path / "test")
    with pytest.raises(DataError, match="test is a link that leads out"):
        images(folder=str(root))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    root = _tree(tmp_path)
    os.mkfifo(root / "train" / "cat" / "pipe.png")
    with pytest.raises(DataError, match=r"pipe\.png \(no file"):
        images(folder=str(root))


def test_names_in_any_script_are_classes_whatever_their_spelling(tmp_path: Path) -> None:
    for part, accented in (("train", "caf\u00e9"), ("test", "cafe\u0301")):
        for label in (accented, "猫"):
            _save(tmp_path / part / label / "été 1.png", _pixels(0))
    train, test = images(folder=str(tmp_path))
    assert train.classes == test.classes == ("caf\u00e9", "猫")


def test_a_class_that_cannot_be_printed_is_refused(tmp_path: Path) -> None:
    for label in ("a", "b\x1b[2J"):
        _save(tmp_path / label / "0.png", _pixels(0))
    with pytest.raises(DataError, match="cannot be printed") as error:
        images(folder=str(tmp_path))
    assert "\x1b" not in str(error.value)


def test_folders_that_are_no_classes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no folder"):
        images(folder=str(tmp_path / "absent"))
    with pytest.raises(DataError, match="holds no folder"):
        images(folder=str(tmp_path))
    _tree(tmp_path)
    (tmp_path / "extra").mkdir()
    with pytest.raises(DataError, match="'extra' beside train"):
        images(folder=str(tmp_path))
    (tmp_path / "extra").rename(tmp_path / "val")
    (tmp_path / "validation").mkdir()
    with pytest.raises(DataError, match="both validation and val"):
        images(folder=str(tmp_path))


def test_parts_without_classes_are_not_taken_for_classes(tmp_path: Path) -> None:
    for part in ("train", "test"):
        _save(tmp_path / part / "0.png", _pixels(0))
    with pytest.raises(DataError, match="train holds no folder"):
        images(folder=str(tmp_path))
    (tmp_path / "train").rename(tmp_path / "val")
    with pytest.raises(DataError, match="has no folder train"):
        images(folder=str(tmp_path))


def test_an_image_outside_the_classes_is_not_left_out_in_silence(tmp_path: Path) -> None:
    root = _tree(tmp_path)
    _save(root / "train" / "lost.png", _pixels(0))
    with pytest.raises(DataError, match=r"lost\.png \(outside the folder of a class"):
        images(folder=str(root))


def test_without_pillow_the_error_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "PIL.Image", None)
    with pytest.raises(UsageError, match=r'pip install "attar\[images\]"'):
        images(folder=str(tmp_path))


def test_a_recipe_on_a_folder_reaches_a_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from attar.cli import main

    for part, count in (("train", 40), ("val", 10), ("test", 20)):
        for label, shade in (("dark", 40), ("light", 200)):
            for i in range(count):
                image = np.clip(_pixels(i, 10, 14) // 8 + shade, 0, 255).astype(np.uint8)
                _save(tmp_path / "photos" / part / label / f"{i}.png", image)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "task: image-classification\n"
        f"data: {{name: images, folder: {json.dumps(str(tmp_path / 'photos'))}, size: 8}}\n"
        "teacher: {model: {name: mlp, widths: [16]}, train: {epochs: 8}}\n"
        "student: {name: mlp, widths: [4]}\n"
        "stages:\n"
        "  - do: distill\n"
        "    epochs: 3\n"
        "    terms: [{loss: kl_divergence}]\n"
    )
    words = ["attar", "run", str(recipe), "--run", str(tmp_path / "out"), "--quiet"]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit) as left:
        main()
    assert not left.value.code
    verdict = json.loads((tmp_path / "out" / "verdict.json").read_text())
    assert verdict["outcome"] == "no difference"
    assert verdict["examples"] == 40
    assert verdict["models"]["teacher"]["per_class"] == {"dark": 1.0, "light": 1.0}
