"""Models of transformers: the same logits, the same bits, the same folder for both libraries."""

from __future__ import annotations

import json
import logging
import subprocess
import sys

import numpy as np
import pytest
import torch

import attar
from attar import models
from attar.runtime import DataError, UsageError

hf = pytest.importorskip("transformers")

SMALL = {
    "resnet": {
        "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic",
    },
    "mobilenet_v2": {"depth_multiplier": 0.25},
    "convnext": {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "patch_size": 2},
    "vit": {
        "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 32, "patch_size": 4,
    },
    "swin": {
        "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 2, "patch_size": 2,
    },
}  # fmt: skip
INNER = {
    "resnet": "resnet.encoder.stages.0",
    "mobilenet_v2": "mobilenet_v2.layer.3",
    "convnext": "convnext.encoder.stages.0",
    "vit": "vit.layers.0",
    "swin": "swin.encoder.layers.0",
}
NAMES = ("ant", "bee", "cat")
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch.manual_seed(0)


def foreign(architecture, folder, *, names=NAMES, pixels=True, side=16, **more):
    """A model that transformers itself makes and saves."""
    kind = hf.models.auto.configuration_auto.CONFIG_MAPPING[architecture]
    values = SMALL[architecture] | {"id2label": dict(enumerate(names)), "image_size": side} | more
    if architecture == "resnet":
        values.pop("image_size")
    config = kind(**values, label2id={name: i for i, name in enumerate(names)})
    model = hf.AutoModelForImageClassification.from_config(config).eval()
    model.save_pretrained(folder)
    if pixels:
        processor(side).save_pretrained(folder)
    return model


def processor(side):
    return hf.ViTImageProcessorPil(
        size={"height": side, "width": side}, image_mean=MEAN, image_std=STD
    )


def pictures(count=6, channels=3, side=16):
    generator = np.random.default_rng(0)
    return generator.integers(0, 256, (count, channels, side, side), dtype=np.uint8)


def source(classes=NAMES, **how):
    labels = np.arange(6) % len(classes)
    return attar.data.TensorSource(pictures(**how), labels, classes=classes)


def logits(model, images):
    with torch.no_grad():
        return model(images)


def seen_by_transformers(folder, images):
    """Pixels as the image processor of *folder* makes them."""
    read = hf.ViTImageProcessorPil.from_pretrained(folder)
    return read(list(images), return_tensors="pt", input_data_format="channels_first")[
        "pixel_values"
    ]


@pytest.mark.parametrize("architecture", SMALL)
def test_logits_are_those_of_transformers_on_preprocessed_pixels(architecture, tmp_path):
    theirs = foreign(architecture, tmp_path)
    data = source()
    ours = models.build("pretrained", data=data, path=str(tmp_path))
    inputs = data.rows(torch.arange(6))["inputs"]
    wanted = logits(theirs, seen_by_transformers(tmp_path, pictures())).logits
    torch.testing.assert_close(logits(ours, inputs), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("architecture", SMALL)
def test_a_saved_model_is_one_folder_for_both_libraries(architecture, tmp_path):
    data = source()
    ours = models.build(
        "transformers", data=data, architecture=architecture, config=SMALL[architecture]
    )
    inputs = data.rows(torch.arange(6))["inputs"]
    ours.train()(inputs).sum().backward()  # moves the running statistics, where there are any
    ours.eval()
    models.save(ours, tmp_path)
    again = models.load(tmp_path)
    theirs = hf.AutoModelForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(logits(again, inputs), logits(ours, inputs))
    assert theirs.state_dict().keys() == ours.state_dict().keys()
    assert theirs.config.id2label == dict(enumerate(NAMES))
    assert type(theirs).__name__ == theirs.config.architectures[0]
    seen = seen_by_transformers(tmp_path, pictures())
    torch.testing.assert_close(logits(theirs, seen).logits, logits(ours, inputs), rtol=0, atol=1e-5)


def test_a_model_from_a_folder_is_saved_and_loaded_without_that_folder(tmp_path):
    foreign("swin", tmp_path / "theirs")
    data = source()
    ours = models.build("pretrained", data=data, path=str(tmp_path / "theirs"))
    models.save(ours, tmp_path / "ours")
    (tmp_path / "theirs").rename(tmp_path / "gone")
    inputs = data.rows(torch.arange(6))["inputs"]
    state = torch.random.get_rng_state()
    again = models.load(tmp_path / "ours")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(logits(again, inputs), logits(ours, inputs))
    assert again.attar_build == ours.attar_build
    assert "theirs" not in (tmp_path / "ours" / "model.json").read_text()


def test_a_copy_is_a_model_of_its_own(tmp_path):
    import copy

    ours = models.build("transformers", data=source(), architecture="vit", config=SMALL["vit"])
    second = copy.deepcopy(ours)
    with torch.no_grad():
        second.classifier.bias.add_(1.0)
    assert type(second) is type(ours)
    assert not torch.equal(second.classifier.bias, ours.classifier.bias)


def test_replacing_the_model_in_a_folder_takes_its_other_description_away(tmp_path):
    shape = {"shape": (3, 16, 16), "outputs": 3}
    vit = models.build("transformers", **shape, architecture="vit", config=SMALL["vit"])
    models.save(vit, tmp_path)
    assert (tmp_path / "config.json").exists()
    models.save(models.build("mlp", **shape), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.json", "model.safetensors"]


def test_a_config_beside_a_model_that_is_not_of_transformers_stays(tmp_path):
    mlp = models.build("mlp", shape=(3, 4, 4), outputs=3)
    models.save(mlp, tmp_path)
    (tmp_path / "config.json").write_text("mine")
    models.save(mlp, tmp_path)
    assert (tmp_path / "config.json").read_text() == "mine"


# ---------------------------------------------------------------- classes and heads


def test_classes_in_another_order_are_put_into_the_datas_order(tmp_path):
    theirs = foreign("convnext", tmp_path)
    data = source(classes=("cat", "ant", "bee"))
    ours = models.build("pretrained", data=data, path=str(tmp_path), head="keep")
    wanted = logits(theirs, seen_by_transformers(tmp_path, pictures())).logits[:, [2, 0, 1]]
    found = logits(ours, data.rows(torch.arange(6))["inputs"])
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    assert ours.config.id2label == {0: "cat", 1: "ant", 2: "bee"}


def test_a_folder_without_names_of_its_own_has_the_datas_order(tmp_path):
    theirs = foreign("vit", tmp_path, names=("LABEL_0", "LABEL_1", "LABEL_2"))
    ours = models.build("pretrained", data=source(), path=str(tmp_path), head="keep")
    assert torch.equal(ours.classifier.weight, theirs.classifier.weight)
    assert ours.config.id2label == dict(enumerate(NAMES))


@pytest.mark.parametrize("names", [("a", "b"), ("ant", "bee", "dog")])
def test_other_classes_give_a_new_head_on_the_same_body(names, tmp_path):
    theirs = foreign("resnet", tmp_path, names=names)
    ours = models.build("pretrained", data=source(), path=str(tmp_path))
    assert ours.classifier[1].weight.shape == (3, 16)
    theirs_state = theirs.state_dict()
    for name, tensor in ours.state_dict().items():
        same = tensor.shape == theirs_state[name].shape and torch.equal(tensor, theirs_state[name])
        assert same == (not name.startswith("classifier"))


def test_a_new_head_follows_the_seed(tmp_path):
    foreign("vit", tmp_path, names=("a", "b"))

    def head(seed):
        torch.manual_seed(seed)
        return models.build("pretrained", data=source(), path=str(tmp_path)).classifier.weight

    assert torch.equal(head(3), head(3))
    assert not torch.equal(head(3), head(4))


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("a", "b"), "knows 2 classes, but the data have 3"),
        (("ant", "bee", "dog"), r"\(ant, bee, dog\) are not those of the data, which have cat"),
    ],
)
def test_a_head_to_keep_must_be_for_the_datas_classes(names, said, tmp_path):
    foreign("vit", tmp_path, names=names)
    with pytest.raises(DataError, match=said):
        models.build("pretrained", data=source(), path=str(tmp_path), head="keep")


def test_a_body_without_a_head_can_be_a_student_but_no_teacher(tmp_path):
    hf.ViTModel(hf.ViTConfig(**SMALL["vit"], image_size=16)).save_pretrained(tmp_path)
    ours = models.build("pretrained", data=source(), path=str(tmp_path))
    assert ours.classifier.weight.shape == (3, 16)
    with pytest.raises(DataError, match="has no trained head"):
        models.build("pretrained", data=source(), path=str(tmp_path), head="keep")


# ---------------------------------------------------------------- pixels


def test_one_channel_is_repeated_and_another_size_is_resized(tmp_path):
    theirs = foreign("vit", tmp_path)
    data = source(channels=1, side=8)
    ours = models.build("pretrained", data=data, path=str(tmp_path))
    inputs = data.rows(torch.arange(6))["inputs"]
    large = torch.nn.functional.interpolate(inputs, (16, 16), mode="bilinear", antialias=True)
    mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    wanted = logits(theirs, (large.expand(-1, 3, -1, -1) - mean) / std).logits
    torch.testing.assert_close(logits(ours, inputs), wanted, rtol=0, atol=1e-6)


def test_images_of_too_many_channels_are_refused(tmp_path):
    foreign("vit", tmp_path, num_channels=1)
    with pytest.raises(UsageError, match="reads images of 1 channel, but the data have 3"):
        models.build("pretrained", data=source(), path=str(tmp_path), head="keep")


@pytest.mark.parametrize(
    ("content", "size", "mean", "std"),
    [
        (None, (16, 16), 0.5, 0.5),
        ({"do_normalize": False, "size": 24}, (24, 24), 0.0, 1.0),
        ({"image_mean": [0.1] * 3, "image_std": [0.2] * 3, "do_resize": False}, None, 0.1, 0.2),
        (
            {"size": {"shortest_edge": 40}, "do_center_crop": True,
             "crop_size": {"height": 32, "width": 24}, "image_mean": [0.1] * 3,
             "image_std": [0.2] * 3},
            (32, 24), 0.1, 0.2,
        ),
        (
            {"rescale_factor": 1 / 127.5, "rescale_offset": True, "do_normalize": False,
             "size": {"shortest_edge": 16}},
            (16, 16), 0.5, 0.5,
        ),
        (
            {"do_rescale": False, "image_mean": [25.5] * 3, "image_std": [51.0] * 3, "size": 16},
            (16, 16), 0.1, 0.2,
        ),
    ],
)  # fmt: skip
def test_the_image_processors_settings_are_kept(content, size, mean, std, tmp_path):
    foreign("vit", tmp_path, pixels=False)
    if content is not None:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(content))
    ours = models.build("pretrained", data=source(), path=str(tmp_path))
    assert ours.preprocess.size == size
    images = torch.rand(2, 3, *(size or (16, 16)))
    torch.testing.assert_close(ours.preprocess(images), (images - mean) / std)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[]", "no JSON table"),
        ("{", "no JSON table"),
        ('{"image_mean": "grey"}', "cannot be understood"),
        ('{"do_flip_channel_order": true}', "blue, green, red"),
    ],
)
def test_a_preprocessor_that_makes_no_sense_is_refused(content, said, tmp_path):
    foreign("vit", tmp_path, pixels=False)
    (tmp_path / "preprocessor_config.json").write_text(content)
    with pytest.raises(DataError, match=said):
        models.build("pretrained", data=source(), path=str(tmp_path))


# ---------------------------------------------------------------- taps and training


@pytest.mark.parametrize("architecture", SMALL)
def test_a_term_reaches_an_inner_feature_and_training_changes_the_student(architecture, tmp_path):
    foreign(architecture, tmp_path)
    data = source()
    task = attar.tasks.ImageClassification(classes=NAMES)
    teacher = models.build("pretrained", data=data, path=str(tmp_path), head="keep")
    student = models.build(
        "transformers", data=data, architecture=architecture, config=SMALL[architecture]
    )
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    # Swin's layers give several tensors; the first is the feature.
    address = f"feature:{INNER[architecture]}" + "[0]" * (architecture == "swin")
    terms = [attar.Term(attar.losses.mse, student=address, teacher=address)]
    taught = attar.Teacher(teacher, task)
    attar.distill(student, taught, data, task, terms, epochs=1, batch_size=6, label_weight=0.0)
    changed = {n for n, t in student.state_dict().items() if not torch.equal(t, before[n])}
    assert any(name.startswith(INNER[architecture]) for name in changed)


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"architecture": "resnett"}, "did you mean 'resnet'"),
        ({"architecture": "vit", "config": {"patch_size": 32}}, "32x32 patches of vit are larger"),
        ({"architecture": "clip"}, "there is no image classifier 'clip'"),
        ({"architecture": "resnet", "config": {"depth": [1]}}, "did you mean 'depths'"),
        ({"architecture": "vit", "config": {"num_hidden_layers": 10**6}}, "may be 1000 at most"),
        ({"architecture": "vit", "config": {"hidden_size": 2**30}}, "may be 16777216 at most"),
        ({"architecture": "vit", "config": {"hidden_size": "wide"}}, "vit cannot be built so"),
        ({"architecture": "vit", "config": {"attn_implementation": "x/y"}}, "has no 'attn_impl"),
        ({"architecture": "vit", "config": {"auto_map": {}}}, "has no 'auto_map'"),
    ],
)
def test_architectures_and_values_are_checked(options, said):
    with pytest.raises(UsageError, match=said):
        models.build("transformers", shape=(3, 16, 16), outputs=3, **options)


def test_an_architecture_without_an_option_gets_the_datas_image():
    model = models.build("transformers", shape=(1, 8, 12), outputs=4, architecture="vit",
                         config=SMALL["vit"])  # fmt: skip
    assert (model.config.num_channels, list(model.config.image_size)) == (1, [8, 12])
    assert model(torch.rand(2, 1, 8, 12)).shape == (2, 4)


def test_pickled_weights_in_a_folder_are_not_read(tmp_path):
    model = foreign("vit", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(DataError, match=r"attar import .*pytorch_model.bin --into"):
        models.build("pretrained", data=source(), path=str(tmp_path))


def test_code_beside_a_model_is_not_run(tmp_path):
    foreign("vit", tmp_path)
    ran = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(f"open({str(ran)!r}, 'w')\n")
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.C", "AutoModelForImageClassification": "evil.M"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    models.build("pretrained", data=source(), path=str(tmp_path))
    assert not ran.exists()


def test_weights_that_are_not_the_networks_are_refused(tmp_path):
    foreign("vit", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(DataError, match=r"lack vit\.layers\.2"):
        models.build("pretrained", data=source(), path=str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 33}))
    with pytest.raises(DataError, match="cannot be loaded"):
        models.build("pretrained", data=source(), path=str(tmp_path))


@pytest.mark.parametrize("content", [b"", b"{}", b"{", b'{"model_type": "bert"}'])
def test_a_config_that_is_no_image_classifiers_is_refused(content, tmp_path):
    foreign("vit", tmp_path)
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(DataError, match=str(tmp_path)):
        models.build("pretrained", data=source(), path=str(tmp_path))


def test_a_hub_id_without_a_network_is_one_sentence(monkeypatch):
    code = (
        "import attar\nfrom attar.runtime import DataError\n"
        "try:\n"
        "    attar.models.build('pretrained', shape=(3, 8, 8), outputs=2, path='no-one/nothing')\n"
        "except DataError as error:\n"
        "    print(error)\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.startswith("no-one/nothing: there is no such folder, and the hub did not")
    assert out.stdout.count("\n") == 1
    assert out.stderr == ""


def test_a_weights_file_that_is_not_there_is_not_asked_of_the_hub():
    assert models.is_foreign("no-one/nothing")
    for suffix in ("pt", "bin", "safetensors"):
        assert not models.is_foreign(f"absent/teacher.{suffix}")


def test_attempts_to_reach_the_hub_are_not_told_one_by_one(tmp_path, monkeypatch):
    hub = logging.getLogger("huggingface_hub")
    before, seen = hub.level, []
    config = hf.AutoConfig.from_pretrained

    def spied(*args, **options):
        seen.append(hub.isEnabledFor(logging.WARNING))
        return config(*args, **options)

    foreign("vit", tmp_path)
    monkeypatch.setattr(hf.AutoConfig, "from_pretrained", spied)
    models.build("pretrained", data=source(), path=str(tmp_path))
    assert (seen, hub.level) == ([False], before)


def test_transformers_that_is_not_installed_is_said_with_the_line_to_type(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    for family, options in (
        ("transformers", {"architecture": "vit"}),
        ("pretrained", {"path": "x"}),
    ):
        with pytest.raises(UsageError, match=r'pip install "attar\[transformers\]"'):
            models.build(family, shape=(3, 8, 8), outputs=2, **options)


def test_the_room_does_not_import_transformers():
    code = (
        "import sys, attar.models\nprint([m for m in ('transformers', 'timm') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


# ---------------------------------------------------------------- timm


def test_timm_that_is_not_installed_is_said_with_the_line_to_type(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UsageError, match=r'pip install "attar\[timm\]"'):
        models.build("timm", shape=(3, 8, 8), outputs=2, architecture="resnet18")


def test_a_model_of_timm_is_built_saved_and_loaded(tmp_path):
    pytest.importorskip("timm", exc_type=ImportError)
    options = {"shape": (1, 32, 32), "outputs": 3, "mean": [0.5], "std": [0.2]}
    ours = models.build("timm", architecture="resnet18", **options).eval()
    assert "fc.weight" in ours.state_dict()
    images = torch.rand(2, 1, 32, 32)
    models.save(ours, tmp_path)
    assert torch.equal(logits(models.load(tmp_path), images), logits(ours, images))
    for bad, said in (("resnet1", "did you mean"), ("hf-hub:a/b", "no model")):
        with pytest.raises(UsageError, match=said):
            models.build("timm", architecture=bad, **options)


class Tiny(torch.nn.Module):
    """The smallest image classifier there is."""

    def __init__(self, channels, classes):
        super().__init__()
        self.fc = torch.nn.Linear(channels, classes)

    def forward(self, images):
        return self.fc(images.mean((2, 3)))


class FakeTimm:
    """What attar asks of timm, so that the family is tried where timm is not."""

    @staticmethod
    def list_models():
        return ["tiny"]

    @staticmethod
    def create_model(name, *, pretrained, num_classes, in_chans, scale=1):
        assert name == "tiny"
        assert not pretrained
        return Tiny(in_chans, num_classes)


def test_the_family_timm_asks_timm_for_names_and_builds_with_them(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "timm", FakeTimm)
    options = {"shape": (1, 8, 8), "outputs": 3, "mean": [0.5], "std": [0.2]}
    ours = models.build("timm", architecture="tiny", **options).eval()
    images = torch.rand(2, 1, 8, 8)
    wanted = torch.nn.functional.linear(
        (images.mean((2, 3)) - 0.5) / 0.2, ours.fc.weight, ours.fc.bias
    )
    torch.testing.assert_close(logits(ours, images), wanted)
    models.save(ours, tmp_path)
    assert torch.equal(logits(models.load(tmp_path), images), logits(ours, images))
    with pytest.raises(UsageError, match="did you mean 'tiny'"):
        models.build("timm", architecture="tinny", **options)
    with pytest.raises(UsageError, match="'checkpoint_path' is not for options"):
        models.build("timm", architecture="tiny", options={"checkpoint_path": "x.pth"}, **options)
