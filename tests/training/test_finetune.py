"""Fine-tuning on a folder of images, read in place: other classes, another size."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from bvit_jax import cli, data, models, weights
from bvit_jax import config as config_lib
from bvit_jax.data.prepare.imagefolder import imagefolder_source
from bvit_jax.errors import UserError
from bvit_jax.runtime.arguments import parse_config
from bvit_jax.training import initial
from bvit_jax.weights.preprocessing import Preprocessing, deit_preprocessing
from bvit_jax.weights.state_dicts import abstract_variables

SPLITS = {"train": range(24), "val": range(24, 36)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits 3 to 5 as files, in classes whose names are not sorted like the digits."""
    root, digits = tmp_path_factory.mktemp("folder") / "images", load_digits()
    for digit, name in ((3, "c"), (4, "a"), (5, "b")):
        pictures = digits.images[digits.target == digit]
        for split, chosen in SPLITS.items():
            directory = root / split / name
            directory.mkdir(parents=True)
            for index in chosen:
                pixels = np.round(pictures[index] * (255 / 16)).astype(np.uint8)
                Image.fromarray(pixels).save(directory / f"{index}.png")
    return root


def config_of(folder: Path, options: str = "", *more: str):
    return parse_config([f"--config=finetune:folder={folder}{options}", *more])


def test_a_folder_is_read_in_place_as_it_would_be_prepared(folder: Path, tmp_path: Path):
    split = data.open_split("folder", str(folder), "train")
    assert split.class_names == ("a", "b", "c")
    assert (split.num_examples, split.num_classes) == (72, 3)
    first = imagefolder_source("mine", folder, tmp_path).splits[0]
    prepared = [example for part in first.parts for _, example in part.examples()]
    for index, example in enumerate(prepared):
        record = split.source[index]
        assert record["label"] == split.class_names.index(example["label"])
        assert record["image"] == Path(folder / "train" / example["file_name"]).read_bytes()


@pytest.mark.parametrize(
    ("dataset", "data_dir", "split", "message"),
    [
        ("folder", "", "train", "config.data.data_dir is empty; name the folder"),
        ("folder", "HERE", "vale", "no split 'vale' in HERE; did you mean 'val'?"),
        ("folder", "HERE/train", "a", "has no directories; expected one per class"),
    ],
)
def test_what_is_wrong_with_a_folder(dataset: str, data_dir: str, split: str, message: str, folder: Path):
    with pytest.raises(UserError) as error:
        data.open_split(dataset, data_dir.replace("HERE", str(folder)), split)
    assert message.replace("HERE", str(folder)) in str(error.value)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("", "finetune needs a folder of images, --config=finetune:folder=DIR"),
        ("folder=HERE,imagesize=3", "finetune has no option 'imagesize'; did you mean 'image_size'?"),
        ("folder=HERE,image_size=big", "image_size is 'big'; expected a number of pixels"),
        ("folder=HERE/train", "train/a has no directories; expected one per class"),
    ],
)
def test_what_is_wrong_with_the_argument(argument: str, message: str, folder: Path):
    with pytest.raises(UserError) as error:
        parse_config([f"--config=finetune:{argument.replace('HERE', str(folder))}"])
    assert message in str(error.value)


def test_the_configuration_is_that_of_the_weights(folder: Path):
    config = config_of(folder)
    config_lib.validate(config)
    source = weights.load(Path(config.init.path))
    assert config.model.width == source.config.width
    assert (config.model.num_classes, config.model.image_size) == (3, source.config.image_size)
    assert config.data.eval_resize == source.preprocessing.resize
    assert tuple(config.data.mean) == source.preprocessing.mean


# timm: floor(size / crop_pct), with the crop_pct of 224 / 256.
@pytest.mark.parametrize(("size", "resize"), [(224, 256), (288, 329), (384, 438), (448, 512)])
def test_other_sizes_are_preprocessed_as_timm_does(size: int, resize: int):
    scaled = deit_preprocessing(224).scaled_to(size)
    assert (scaled.resize, scaled.crop) == (resize, size)
    assert scaled == deit_preprocessing(size)
    assert Preprocessing(232, 224).scaled_to(288).resize == 298


def test_weights_are_adapted_to_size_and_classes(folder: Path):
    config = config_of(folder, ",image_size=48")
    model = models.create_model(config.model)
    given = initial.load(config, abstract_variables(model, 48)).variables["params"]
    source = weights.load(Path(config.init.path)).variables["params"]
    assert given["embedding"]["positions"].shape[1] > source["embedding"]["positions"].shape[1]
    assert given["head"]["kernel"].shape[1] == 3
    np.testing.assert_array_equal(
        given["block0"]["mlp_in"]["kernel"], np.asarray(source["block0"]["mlp_in"]["kernel"])
    )
    config.init.adapt = False
    with pytest.raises(UserError, match=r"adapt them: config\.init\.adapt=True"):
        initial.load(config, abstract_variables(model, 48))


@pytest.mark.slow
def test_one_command_fine_tunes_and_evaluates(folder: Path, tmp_path: Path, capsys):
    command = ["train", f"--config=finetune:folder={folder}", f"--workdir={tmp_path / 'run'}"]
    shorter = ["--config.epochs=12", "--config.batch_size=24", "--config.eval_batch_size=40"]
    shorter += ["--config.optim.learning_rate=2e-3", "--config.eval_every_epochs=12"]
    assert cli.main([*command, *shorter, "--config.health=False"]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["images"] == 36
    assert figures["top1"] > 0.8  # the weights know digits
    assert cli.main(["eval", f"--workdir={tmp_path / 'run'}"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["top1"] == figures["top1"]
    assert json.loads((tmp_path / "run" / "classes.json").read_text()) == ["a", "b", "c"]
