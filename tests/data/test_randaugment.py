"""RandAugment and colour jitter against what timm and torchvision compute (tests/golden/README.md)."""

import hashlib
import io
import itertools

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from bvit_jax import data
from bvit_jax.data import images, randaugment, transforms
from bvit_jax.data.randaugment import OPERATIONS, Canvas, apply_operation, parse_policy, rand_augment
from bvit_jax.errors import UserError
from tests.conftest import GOLDEN

FILL = (124, 116, 104)
BICUBIC = Image.Resampling.BICUBIC
RESAMPLES = (Image.Resampling.BILINEAR, BICUBIC)


@pytest.fixture(scope="module")
def timm() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "augmentation.npz") as archive:
        return dict(archive)


@pytest.fixture(scope="module")
def photo(timm: dict[str, np.ndarray]) -> Image.Image:
    return Image.fromarray(timm["image"])


def digest(image: Image.Image) -> list[int]:
    return list(hashlib.sha256(np.asarray(image).tobytes()).digest()[:8])


# --- operations ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", randaugment.OF_TIMM)
def test_operation_equals_timm(name: str, timm: dict[str, np.ndarray], photo: Image.Image) -> None:
    before = photo.tobytes()
    cases = itertools.product(enumerate(RESAMPLES), enumerate(timm["magnitudes"].tolist()), (0, 1))
    for (i, resample), (j, magnitude), negative in cases:
        level = magnitude / 10
        signed = -level if negative and OPERATIONS[name].signed else level
        image = apply_operation(photo, name, signed, Canvas(resample, FILL))
        expected = timm[f"operation/{name}"][i, j, negative].tolist()
        assert digest(image) == expected, (resample, magnitude, negative)
        assert (image.mode, image.size) == ("RGB", photo.size)
    assert photo.tobytes() == before


@pytest.mark.parametrize(
    ("name", "strengths"),  # at the levels 0, 0.5, 0.9 and 1, and at -0.9 for signed operations
    [
        ("Rotate", (0, 15, 27, 30, -27)),
        ("ShearX", (0, 0.15, 0.27, 0.3, -0.27)),
        ("ShearY", (0, 0.15, 0.27, 0.3, -0.27)),
        ("TranslateXRel", (0, 0.225, 0.405, 0.45, -0.405)),
        ("TranslateYRel", (0, 0.225, 0.405, 0.45, -0.405)),
        ("Posterize", (0, 2, 3, 4)),
        ("PosterizeIncreasing", (4, 2, 1, 0)),
        ("Solarize", (0, 128, 230, 256)),
        ("SolarizeIncreasing", (256, 128, 26, 0)),
        ("SolarizeAdd", (0, 55, 99, 110)),
        ("Color", (0.1, 1, 1.72, 1.9)),
        ("ColorIncreasing", (1, 1.45, 1.81, 1.9, 0.19)),
        ("ContrastIncreasing", (1, 1.45, 1.81, 1.9, 0.19)),
        ("BrightnessIncreasing", (1, 1.45, 1.81, 1.9, 0.19)),
        ("SharpnessIncreasing", (1, 1.45, 1.81, 1.9, 0.19)),
    ],
)
def test_ranges_and_signs(name: str, strengths: tuple[float, ...]) -> None:
    operation = OPERATIONS[name]
    assert operation.signed == (len(strengths) == 5)
    for level, expected in zip((0, 0.5, 0.9, 1, -0.9), strengths):
        assert operation.strength(level) == pytest.approx(expected, abs=1e-12)


def test_no_bits_make_an_image_black(photo: Image.Image) -> None:
    black = apply_operation(photo, "PosterizeIncreasing", 1.0, Canvas(BICUBIC, FILL))
    assert not np.asarray(black).any()
    same = apply_operation(photo, "Posterize", 2.5, Canvas(BICUBIC, FILL))
    assert same.tobytes() == photo.tobytes()


def test_sets_of_operations() -> None:
    common = "AutoContrast Equalize Invert Rotate ShearX ShearY SolarizeAdd TranslateXRel TranslateYRel"
    both = "Brightness Color Contrast Posterize Sharpness Solarize"
    assert sorted(randaugment.PLAIN) == sorted(f"{common} {both}".split())
    increasing = [f"{name}Increasing" for name in both.split()]
    assert sorted(randaugment.INCREASING) == sorted([*common.split(), *increasing])
    assert sorted(randaugment.WEIGHTS) == sorted(randaugment.INCREASING)


# --- policies --------------------------------------------------------------------------------


def test_policies() -> None:
    deit = parse_policy("rand-m9-mstd0.5-inc1")
    assert deit == randaugment.Policy(randaugment.INCREASING, magnitude=9, magnitude_std=0.5)
    assert parse_policy("rand") == randaugment.Policy(randaugment.PLAIN, magnitude=10)
    full = parse_policy("rand-n3-p0.25-mmax20-m15-mstd101-inc0")
    assert (full.count, full.prob, full.magnitude, full.magnitude_max) == (3, 0.25, 15, 20)
    assert full.magnitude_std == float("inf")
    assert full.operations == randaugment.PLAIN
    weighted = parse_policy("rand-inc1-tweights-m5")
    assert weighted == parse_policy("rand-tweights-m5-inc1")
    assert weighted.operations[weighted.weights.index(max(weighted.weights))] == "Rotate"
    assert sum(weighted.weights) == pytest.approx(1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v0", r"auto_augment is 'v0'; expected '', 'rand-m9-mstd0\.5-inc1' or such as 'draw-m5'"),
        ("draw-m5-inc1", r"'inc1' is for a policy of 'rand'"),
        ("rand-m9-mst0.5", r"'mst0\.5' is unknown; did you mean 'mstd'\?"),
        ("rand-t3a", "'t3a' is unknown"),
        ("rand-m9--inc1", "'' is unknown"),
        ("rand-m", "'m' lacks its number; expected m and a whole number"),
        ("rand-m9.5", r"'m9\.5' lacks its number; expected m and a whole number"),
        ("rand-mstd", "'mstd' lacks its number; expected mstd and a number"),
        ("rand-p1.5", r"'p1\.5' is out of range; expected 0 to 1"),
        ("rand-n0", "'n0' is out of range; expected 1 to 15"),
        ("rand-inc2", "'inc2' is out of range"),
        ("rand-mmax0", "'mmax0' is out of range; expected 1 or more"),
    ],
)
def test_wrong_policies(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_policy(text)


def test_levels_are_cut_normal_and_their_signs_even() -> None:
    rng = np.random.default_rng(0)
    policy = parse_policy("rand-m9-mstd0.5-inc1")
    levels = np.array([randaugment.draw_level(rng, policy, signed=True) for _ in range(20_000)])
    assert abs((levels < 0).mean() - 0.5) < 0.015
    magnitudes = np.abs(levels)
    assert magnitudes.max() == 1
    # Beyond two deviations lie 2.28 % of a normal distribution: here they are cut.
    assert abs((magnitudes == 1).mean() - 0.0228) < 0.004
    assert abs(np.median(magnitudes) - 0.9) < 0.002
    assert abs(np.quantile(magnitudes, 0.1587) - 0.85) < 0.002
    fixed, uniform = parse_policy("rand-m7"), parse_policy("rand-m8-mstd1000")
    assert randaugment.draw_level(rng, fixed, signed=False) == 0.7
    levels = np.array([randaugment.draw_level(rng, uniform, signed=False) for _ in range(5000)])
    assert abs(levels.mean() - 0.4) < 0.01
    assert levels.max() <= 0.8


def drawn_operations(policy: str, times: int, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Canvas]]:
    """The operations that a policy applies, without applying them."""
    applied: list[tuple[str, Canvas]] = []

    def record(image: Image.Image, name: str, level: float, canvas: Canvas) -> Image.Image:
        applied.append((name, canvas))
        return image

    monkeypatch.setattr(randaugment, "apply_operation", record)
    rng, image = np.random.default_rng(0), Image.new("RGB", (2, 2))
    for _ in range(times):
        randaugment.rand_augment(image, rng, policy=parse_policy(policy), resamples=RESAMPLES, fill=FILL)
    return applied


def test_operations_are_drawn_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    applied = drawn_operations("rand-m9-mstd0.5-inc1", 15_000, monkeypatch)
    assert abs(len(applied) - 15_000) < 400  # two an image, each with probability a half
    counts = [sum(name == each for each, _ in applied) for name in randaugment.INCREASING]
    assert max(abs(count - 1000) for count in counts) < 150
    bicubic = np.mean([canvas.resample == BICUBIC for _, canvas in applied])
    assert abs(bicubic - 0.5) < 0.02


def test_weighted_operations_do_not_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    applied = [name for name, _ in drawn_operations("rand-tweights-n15-p1", 20, monkeypatch)]
    for start in range(0, 300, 15):
        assert sorted(applied[start : start + 15]) == sorted(randaugment.INCREASING)
    first = [name for name, _ in drawn_operations("rand-tweights-n1-p1", 4000, monkeypatch)]
    weights = randaugment.WEIGHTS
    assert abs(first.count("Rotate") / 4000 - weights["Rotate"] / sum(weights.values())) < 0.03


@pytest.mark.slow
def test_the_whole_policy_changes_images_as_much_as_timm(
    timm: dict[str, np.ndarray], photo: Image.Image
) -> None:
    rng, policy = np.random.default_rng(1), parse_policy("rand-m9-mstd0.5-inc1")
    pixels = np.asarray(photo, np.float32)
    changes = []
    for _ in range(4000):
        image = randaugment.rand_augment(photo, rng, policy=policy, resamples=(BICUBIC,), fill=FILL)
        changes.append(np.abs(np.asarray(image, np.float32) - pixels).mean())
    # Kolmogorov-Smirnov for values that may occur often, such as 0: two such samples differ by more
    # once in a thousand times.
    share, quantiles, changes = timm["share"], timm["policy/change"], np.sort(changes)
    assert (np.searchsorted(changes, quantiles, side="left") / len(changes) - share).max() < 0.034
    assert (share - np.searchsorted(changes, quantiles, side="right") / len(changes)).max() < 0.034


# --- colour jitter ---------------------------------------------------------------------------


def test_changes_of_colour_equal_torchvision(timm: dict[str, np.ndarray], photo: Image.Image) -> None:
    class Fixed:
        """A generator that draws a given factor."""

        def __init__(self, value: float) -> None:
            self.value = value

        def permutation(self, number: int) -> np.ndarray:
            return np.arange(number)

        def uniform(self, low: float, high: float) -> float:
            assert low <= self.value <= high
            return self.value

    for name in ("brightness", "contrast", "saturation", "hue"):
        strengths = transforms.ColorJitter(**{name: 0.5 if name == "hue" else 1.0})
        for i, value in enumerate(timm["turns" if name == "hue" else "factors"].tolist()):
            image = transforms.color_jitter(photo, Fixed(value), strengths=strengths)  # type: ignore[arg-type]
            assert digest(image) == timm[f"jitter/{name}"][i].tolist(), (name, value)


def test_jitter_draws_uniformly_and_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[tuple[str, float]] = []
    for name in ("_change_brightness", "_change_contrast", "_change_saturation", "turn_hue"):

        def record(image: Image.Image, value: float, name: str = name) -> Image.Image:
            order.append((name, value))
            return image

        monkeypatch.setattr(transforms, name, record)
    rng, image = np.random.default_rng(0), Image.new("RGB", (2, 2))
    strengths = transforms.ColorJitter(0.4, 1.5, 0.0, 0.1)
    for _ in range(6000):
        transforms.color_jitter(image, rng, strengths=strengths)
    orders = [tuple(name for name, _ in order[i : i + 3]) for i in range(0, len(order), 3)]
    assert len(set(orders)) == 6
    assert max(abs(orders.count(each) / 6000 - 1 / 6) for each in set(orders)) < 0.03
    ranges = {"_change_brightness": (0.6, 1.4), "_change_contrast": (0, 2.5), "turn_hue": (-0.1, 0.1)}
    for name, (low, high) in ranges.items():
        values = np.array([value for each, value in order if each == name])
        assert abs((values.min() - low) / (high - low)) < 0.01
        assert abs((values.max() - high) / (high - low)) < 0.01
        assert abs((values.mean() - low) / (high - low) - 0.5) < 0.02


def test_no_jitter_leaves_the_image(photo: Image.Image) -> None:
    rng = np.random.default_rng(0)
    assert transforms.color_jitter(photo, rng, strengths=transforms.ColorJitter()) is photo


# --- settings --------------------------------------------------------------------------------


def test_augment_of_the_settings(make_config) -> None:  # type: ignore[no-untyped-def]
    mean = (0.485, 0.456, 0.406)
    assert data.train_augment(make_config()) is None
    policy = "rand-m9-mstd0.5-inc1"
    augment = data.train_augment(make_config(auto_augment=policy, crop_interpolation="bicubic", mean=mean))
    assert augment.keywords == {"policy": parse_policy(policy), "resamples": (BICUBIC,), "fill": FILL}
    either = data.train_augment(make_config(auto_augment=policy, crop_interpolation="random"))
    assert sorted(either.keywords["resamples"]) == sorted(RESAMPLES)
    jitter = data.train_augment(make_config(color_jitter=(0.4, 0.4, 0.4, 0.0)))
    assert jitter.keywords == {"strengths": transforms.ColorJitter(0.4, 0.4, 0.4)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"auto_augment": "rand-q1"}, "'q1' is unknown"),
        ({"color_jitter": (0.4, 0.4, 0.4, 0.6)}, "color_jitter is .* hue from 0 to 0.5"),
        ({"color_jitter": (-0.4, 0.4, 0.4, 0.0)}, "color_jitter is"),
        ({"color_jitter": (0.4,) * 5}, "color_jitter is"),
        ({"color_jitter": (0.4, 0, 0, 0), "auto_augment": "rand"}, "timm skips the jitter"),
    ],
)
def test_wrong_settings(make_config, changes: dict, message: str) -> None:  # type: ignore[no-untyped-def]
    config: ConfigDict = make_config(**changes)
    with pytest.raises(UserError, match=message):
        data.train_augment(config)
    with pytest.raises(UserError, match=message):
        data.train_batches(config, 8, 8, seed=0)


def test_train_transform_augments_after_the_crop() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3)).astype(np.uint8))
    buffer = io.BytesIO()
    image.save(buffer, "png")
    seen: list[Image.Image] = []

    def augment(image: Image.Image, rng: np.random.Generator) -> Image.Image:
        seen.append(image)
        return Image.new("RGB", image.size, (1, 2, 3))

    result = transforms.train_transform(
        images.decode(buffer.getvalue()),
        np.random.default_rng(0),
        size=16,
        scale=(0.08, 1.0),
        ratio=(3 / 4, 4 / 3),
        interpolation="random",
        flip=True,
        augment=augment,
    )
    assert seen[0].size == (16, 16)
    assert (result == (1, 2, 3)).all()


def test_a_policy_for_drawings_keeps_white_around_and_changes_strokes():
    policy = parse_policy("draw-m10-n1-p1")
    assert set(policy.operations) == {
        *("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel", "Stroke", "Invert")
    }
    line = Image.new("RGB", (32, 32), "white")
    line.paste("black", (8, 16, 24, 17))
    rng = np.random.default_rng(0)
    options = {"resamples": (Image.Resampling.NEAREST,), "fill": (7, 7, 7)}
    pictures = [np.asarray(rand_augment(line, rng, policy=policy, **options)) for _ in range(60)]
    assert not any((picture == 7).any() for picture in pictures)
    wider, narrower = (
        np.asarray(apply_operation(line, "Stroke", level, Canvas(Image.Resampling.NEAREST, (0, 0, 0))))
        for level in (1.0, -1.0)
    )
    assert (wider[15:18, 7:25] == 0).all()
    assert (wider == 0).sum() == 3 * 3 * 18
    assert (narrower == 255).all()
    half = apply_operation(line, "Stroke", 0.5, Canvas(Image.Resampling.NEAREST, (0, 0, 0)))
    assert np.asarray(half)[15, 16].tolist() == [127] * 3
