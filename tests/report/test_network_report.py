"""The report on a network: what is drawn is what was computed, for every model, and the page says it."""

import functools
import json
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from bvit_jax import config as config_lib
from bvit_jax import models, weights
from bvit_jax.report import network as network_report
from bvit_jax.report import network_figures
from bvit_jax.report import network_pictures as draw
from bvit_jax.report.__main__ import main
from bvit_jax.report.curves import subplots
from bvit_jax.report.network import Sample, describe
from bvit_jax.weights.preprocessing import deit_preprocessing
from bvit_jax.weights.pretrained import Pretrained
from bvit_jax.workdir import runs
from configs import digits
from tests.tiny_models import DEIT, SWIN, TINY, abstract_of, random_variables, tiny_pretrained
from tests.weights.test_convert import make_run

pytest.importorskip("matplotlib")

VOID = {"meta", "img"}


class Page(HTMLParser):
    """Checks that elements are nested, and keeps what they are and hold."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and data.strip():
            self.texts.setdefault(self.open[-1], []).append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


TEACHER = Path(str(resources.files("bvit_jax") / "assets" / "deit_digits"))
OTHERS = {
    "bivit_deit": DEIT | {"depth": 1},
    "bivit_swin": SWIN | {"depth": (2, 1)},
}
TITLES = {
    "Images": "images",
    "First-layer filters": "filters",
    "Latent weights": "weights",
    "How far latent weights are from the edge of the window": "weight_magnitudes",
    "Sign flips over training": "flips",
    "Sign balance of activations": "balance",
    "Attention": "attention",
    "Weights of the pooling branches": "branches",
    "Position embeddings": "positions",
}
LINES = [{"step": s, "health": {"flipped": {"a/dense": 0.1 / s, "b": 0.0}}} for s in (1, 2, 3)]


@functools.cache
def model_of(name: str) -> Pretrained:
    if name in TINY:
        return tiny_pretrained(name)
    config = models.model_config(name, **OTHERS[name], num_classes=3)
    names = tuple(f"name {i}" for i in range(3))
    variables = random_variables(abstract_of(config))
    return Pretrained(config, variables, deit_preprocessing(config.image_size), names)


def samples_of(model: Pretrained) -> list[Sample]:
    # Two images, as in test_network_figures, whose compiled programs then serve here too.
    size = model.config.image_size
    rng = np.random.default_rng(0)
    return [Sample(f"<{i}>", rng.integers(0, 256, (size, size, 3), np.uint8)) for i in range(2)]


@functools.cache
def seen_by(name: str) -> network_figures.Seen:
    model = model_of(name)
    return network_figures.look(model, np.stack([sample.pixels for sample in samples_of(model)]))


def sections(name: str, lines=None) -> dict[str, network_report.Picture]:
    model = model_of(name)
    return {p.title: p for p in describe(model, samples_of(model), seen_by(name), lines)}


def error_of(capsys, *arguments) -> str:
    assert main(["network", *map(str, arguments)]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


# --- every model -------------------------------------------------------------------------------

MISSING = {
    "bhvit": {"Sign flips over training": "pass its workdir"},
    "binaryvit": {"Sign flips over training": "pass its workdir"},
    "binaryvit_w4": {"Latent weights": "have 4 bits", "Sign flips over training": "no weights of one bit"},
    "binaryvit_w1a32": {"Sign balance of activations": "no signs"},
    "react_deit": {"Weights of the pooling branches": "no pooling branches"},
    "deit_token": {"Latent weights": "have 32 bits", "Sign balance of activations": "no signs"},
    "swin": {"Latent weights": "have 32 bits", "Weights of the pooling branches": "no pooling"},
    "bivit_release_deit": {"Weights of the pooling branches": "no pooling"},
    "bivit_release_swin": {"Sign flips over training": "pass its workdir"},
    "bivit_deit": {"Sign flips over training": "pass its workdir"},
    "bivit_swin": {"Weights of the pooling branches": "no pooling"},
}


def test_every_model_is_tried():
    assert {model_of(name).config.name for name in MISSING} == set(models.factory.MODELS)


@pytest.mark.slow
@pytest.mark.parametrize("name", MISSING)
def test_all_sections_are_there_drawn_or_not(name):
    found = sections(name)
    binary = "How far latent weights are from the edge of the window" in found
    positions = "Relative position biases" if "swin" in name else "Position embeddings"
    branches = "Weights of the shift branches" if name == "bhvit" else "Weights of the pooling branches"
    other = {"Position embeddings": positions, "Weights of the pooling branches": branches}
    expected = [other.get(title, title) for title in TITLES]
    assert list(found) == [title for title in expected if binary or not title.startswith("How far")]
    for title, reason in MISSING[name].items():
        assert found[title].draw is None
        assert reason in found[title].text
    for picture in found.values():
        assert picture.text.endswith(".")
        if picture.draw is not None:
            assert picture.draw().axes


# --- what is drawn is what was computed --------------------------------------------------------


def test_shares_inside_the_window():
    values = np.concatenate([np.full(3, 1.5), np.linspace(-0.9, 0.9, 9)]).astype(np.float32)
    weights = [
        network_figures.LatentWeights("block0/query/dense", values, 0.75),
        network_figures.LatentWeights("block0/key", values / 100, 1.0),
        network_figures.LatentWeights("other", values / 2, 0.9999),
    ]
    figure = draw.histograms(weights)
    shown = [axis for axis in figure.axes if axis.get_title()]
    assert [axis.get_title() for axis in shown] == ["query  75 %", "key  100 %", "other  >99.9 %"]
    heights, edges, _ = shown[0].patches[-1].get_data()
    counts, _ = np.histogram(values, edges)
    np.testing.assert_allclose(heights, counts / counts.max())
    assert counts.sum() == len(values)
    assert {line.get_xdata()[0] for line in shown[0].lines} == {-1, 1}  # the edges of the window
    figure = draw.magnitudes(weights)
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts == ["75 %", "100 %", ">99.9 %", "inside"]
    medians = [line.get_xdata()[0] for line in figure.axes[0].lines if line.get_marker() == "o"]
    np.testing.assert_allclose(medians, [np.median(np.abs(w.values)) for w in weights])


def test_sign_balance_is_drawn():
    balance = {"a/dense": np.array([0.0, 0.5, 1.0, 0.25]), "b": np.full(4, 0.5)}
    axis = draw.balance(balance).axes[0]
    dots = [line.get_xdata()[0] for line in axis.lines if line.get_marker() == "o"]
    assert dots == [43.75, 50]
    assert [text.get_text() for text in axis.texts] == ["50 %", "0 %", "constant"]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["a", "b"]


def test_flip_rates_are_drawn():
    steps, layers, rates = network_figures.flip_rates(LINES)
    top, heat, _ = draw.flips(steps, layers, rates).axes
    np.testing.assert_allclose(top.lines[0].get_ydata(), [5, 2.5, 10 / 6])
    drawn = heat.images[0].get_array()
    np.testing.assert_allclose(drawn[0], [10, 5, 10 / 3])
    assert drawn.mask[1].all()  # no flips: grey
    assert [label.get_text() for label in heat.get_xticklabels()] == ["1", "2", "3"]


@pytest.mark.parametrize("rates", [[[0.0, 0.0]], [[0.5, 0.5]], [[np.nan, 0.5], [np.nan, 0.0]]])
def test_flip_rates_of_few_values(rates, tmp_path):
    rates = np.array(rates)
    figure = draw.flips([5, 9], [f"layer{i}" for i in range(len(rates))], rates)
    figure.savefig(tmp_path / "flips.png")


@pytest.mark.parametrize("name", ["binaryvit", "deit_token", "bivit_swin"])
def test_attention_is_drawn(name):
    model, seen = model_of(name), seen_by(name)
    blocks = network_figures.blocks_of(model.config)
    binary = name != "deit_token"
    image = samples_of(model)[0].pixels
    figure = draw.attention(image, blocks, seen, binary)
    maps = [a for a in figure.axes if a.images and a.images[0].get_cmap().name == "inferno"]
    ends = network_figures.ends_of_stages(blocks)
    row = len(maps) // len(ends)
    assert row == (3 if name == "deit_token" else 4)
    for i, block in enumerate(ends):
        used = network_figures.whole_attention(seen.used[block.index], block).mean(axis=0)
        keys = used.mean(axis=0)[block.extra_tokens :]
        (drawn,) = maps[(i + 1) * row - 1].images
        assert drawn.get_alpha() is None  # the colours are those of the bar
        np.testing.assert_allclose(np.ravel(drawn.get_array()), keys, rtol=1e-6)
        side, text = drawn.get_array().shape[0], figure.axes[i * (row + 1)].get_ylabel()
        assert f"{block.side}×{block.side} tokens" in text
        assert (f"attend to {side}×{side} keys" in text) == (side != block.side)


@pytest.mark.slow
def test_the_pictures_of_bhvit_are_of_its_blocks():
    model, seen = model_of("bhvit"), seen_by("bhvit")
    blocks = network_figures.blocks_of(model.config)
    figure = draw.attention(samples_of(model)[0].pixels, blocks, seen, True)
    texts = [text for text in (axis.get_ylabel() for axis in figure.axes) if text]
    assert [text.split("\n")[:3] for text in texts] == [
        ["stage 2", "block2", "14×14 tokens"],
        ["stage 3", "block3", "7×7 tokens"],
    ]
    assert all("to merged" in text for text in texts)
    scales = network_figures.branch_scales(model.variables["params"], blocks)
    names = [f"shift_{way}{size}" for size in (3, 5) for way in ("ch", "h", "w")]
    assert list(scales) == ["attention_scale", "mlp_scale", *names]
    assert [alpha is None for alpha in scales["attention_scale"]] == [True, True, False, False]
    top, *small = [axis for axis in draw.branches(scales).axes if axis.get_title()]
    assert "nan" not in [text.get_text() for text in top.texts]
    assert [axis.get_title() for axis in small] == names


@pytest.mark.parametrize(("value", "limits"), [(0, (0, 1)), (0.25, (0, 0.25)), (-0.5, (-0.5, 0))])
def test_attention_that_is_the_same_everywhere(value, limits):
    """A dead attention is drawn as nothing, an average as all."""
    figure, axes = subplots(1, 1, figsize=(4, 4))
    axis = axes.item()
    draw._map(figure, axis, 8, np.full((4, 4), value))
    assert axis.images[0].get_clim() == limits


def test_filters_are_drawn():
    kernel = np.zeros((4, 4, 3, 9), np.float32)
    kernel[:2, :, 0, 3] = 1  # red above, no filter is finer
    axis = draw.filters(kernel, grey=False).axes[0]
    sheet = np.asarray(axis.images[0].get_array())
    y, x = 5, 0  # the last of nine, in rows of eight
    np.testing.assert_array_equal(sheet[y, x], [1, 0.5, 0.5])
    np.testing.assert_array_equal(sheet[y + 3, x], [0.5, 0.5, 0.5])
    assert len(draw.filters(kernel, grey=True).axes) == 2


def test_branches_are_drawn():
    model = model_of("binaryvit")
    params = model.variables["params"]
    scales = network_figures.branch_scales(params, network_figures.blocks_of(model.config))
    figure = draw.branches(scales)
    drawn = np.asarray(figure.axes[0].images[0].get_array())
    for i, name in enumerate(scales):
        expected = [np.abs(params[f"block{b}"][name]["alpha"]).mean() for b in range(3)]
        np.testing.assert_allclose(drawn[i], expected, rtol=1e-6)
    (lines,) = [axis.lines[0] for axis in figure.axes if axis.get_title() == "pool_w3"]
    medians = [np.median(params[f"block{b}"]["pool_w3"]["alpha"]) for b in range(3)]
    np.testing.assert_allclose(lines.get_ydata(), medians, rtol=1e-6)


# --- the command -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What a small run left behind, in a directory whose name is no HTML."""
    workdir = tmp_path_factory.mktemp("runs") / "<i>run & co"
    config = digits.get_config()
    config.model.depth = (1, 1)
    config.model.width, config.model.mlp_dim = (16, 32), (32, 64)
    make_run(workdir, config)
    runs.write_class_names(workdir, [str(i) for i in range(10)])
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return workdir


def check_page(directory: Path) -> Page:
    text = (directory / "index.html").read_text(encoding="utf-8")
    page = Page(text)
    assert "http:" not in text
    assert "https:" not in text
    files = {image["src"] for image in page.all("img")}
    assert files == {path.name for path in directory.iterdir()} - {"index.html"}
    for file in files:
        with Image.open(directory / file) as image:
            image.load()
    return page


@pytest.mark.slow
def test_a_run_of_digits(run, tmp_path, capsys):
    output = tmp_path / "report"
    assert main(["network", f"--checkpoint={run}", "--kind=latest", f"--output={output}"]) == 0
    assert capsys.readouterr().out == f"{output / 'index.html'}\n"
    page = check_page(output)
    assert page.texts["h2"] == list(TITLES)
    assert {image["src"] for image in page.all("img")} == {f"{name}.png" for name in TITLES.values()}
    assert not page.all("i")
    assert page.texts["h1"] == [f"The network of {run}"]


@pytest.mark.slow
def test_a_converted_model_and_an_image(tmp_path):
    image = tmp_path / "<b>.png"
    Image.new("RGB", (40, 50), (200, 30, 60)).save(image)
    output = tmp_path / "report"
    output.mkdir()
    (tmp_path / "somebody's").touch()
    for name in ("index.html", "images.png"):
        (output / name).symlink_to(tmp_path / "somebody's")
    arguments = ["network", f"--checkpoint={TEACHER}", f"--output={output}", "--image", str(image)]
    assert main(arguments) == 0
    page = check_page(output)
    notes = [text for text in page.texts["p"] if text.startswith("Not drawn: ")]
    assert len(notes) == 4  # weights, flips, signs, branches
    assert not page.all("b")
    assert any("<b>.png" in text for text in page.texts["figcaption"])
    assert not (tmp_path / "somebody's").read_bytes()


@pytest.mark.slow
def test_the_default_images():
    digits_model = weights.load(TEACHER)
    found = network_report.default_samples(digits_model)
    assert [sample.name for sample in found] == [f"digit {i}" for i in range(10)]
    seen = network_figures.look(digits_model, np.stack([sample.pixels for sample in found]))
    assert np.mean(np.argmax(seen.probabilities, axis=1) == np.arange(10)) >= 0.9
    (portrait,) = network_report.default_samples(tiny_pretrained("deit"))
    assert portrait.pixels.shape == (32, 32, 3)
    assert portrait.pixels.std() > 30


@pytest.mark.slow
def test_errors(run, tmp_path, capsys):
    checkpoint = f"--checkpoint={run}"
    assert "--image: no file" in error_of(capsys, checkpoint, f"--output={tmp_path}", "--image", "no.png")
    (tmp_path / "file").write_text("no image")
    assert "is a file; name a directory" in error_of(capsys, checkpoint, f"--output={tmp_path / 'file'}")
    assert "cannot use" in error_of(capsys, checkpoint, f"--output={tmp_path}", "--image", tmp_path / "file")
    assert "no best checkpoint" in error_of(capsys, checkpoint, "--kind=best", f"--output={tmp_path}")
    assert "is no training run" in error_of(capsys, f"--checkpoint={TEACHER}", "--kind=best")
    assert "no/such" in error_of(capsys, "--checkpoint=no/such")


def test_weights_that_are_not_finite(tmp_path, capsys):
    model = tiny_pretrained("deit")
    model.variables["params"]["head"]["bias"][0] = np.nan
    weights.save(model, tmp_path / "model")
    message = error_of(capsys, f"--checkpoint={tmp_path / 'model'}", f"--output={tmp_path / 'out'}")
    assert "are not finite, first params/head/bias" in message


@pytest.mark.slow
def test_a_run_without_health(run, tmp_path):
    for lines in ([{"step": 1, "loss": 1.0}], [{"step": 1, "health": {"flipped": {"a": None}}}]):
        assert "do not have them" in sections("binaryvit", lines)["Sign flips over training"].text
    assert sections("binaryvit", LINES)["Sign flips over training"].name == "flips"


def test_metrics_that_cannot_be_read_are_no_error(tmp_path, capsys):
    assert network_report._metrics(tmp_path) == []
    assert capsys.readouterr().err.startswith("flips are not drawn: cannot read")


@pytest.mark.slow
def test_the_run_is_read_as_it_was_trained(run):
    """The weights that are drawn are those of the checkpoint."""
    model = runs.load_model(run)
    config = config_lib.load(run / "config.json")
    assert model.config == config.model
    layers = network_figures.latent_weights(model)
    assert sum(layer.values.size for layer in layers) == sum(
        leaf.size
        for path, leaf in jax.tree_util.tree_leaves_with_path(model.variables["params"])
        if path[-1].key == "kernel" and path[0].key not in ("embedding", "head")
    )
