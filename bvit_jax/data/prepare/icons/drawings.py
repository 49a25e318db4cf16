"""Reads the drawings of the package, and draws them."""

import hashlib
import json
import re
import tarfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

from bvit_jax.data.prepare.icons import table
from bvit_jax.data.prepare.source import Example, Key, Part, Source, SplitSource, dataset_info, file_features
from bvit_jax.errors import UserError

NAME, VERSION = "icons", "1.0.0"
SIDE = 64  # pixels
TYPICAL_BYTES = 920  # of a picture
ENDINGS, BEGINNINGS, HELD_OUT = (
    frozenset(text.split()) for text in (table.ENDINGS, table.BEGINNINGS, table.HELD_OUT)
)
NUMBER = re.compile(r"\d+(px)?")
UNDRAWABLE = re.compile("<(animate|set|text)")  # what moves, which needs a browser, and what needs fonts
BOX = {"left": 0, "top": 0, "width": 16, "height": 16}  # of a drawing, unless it or its set says otherwise
GET_IT = f"get it with: npm pack {table.PACKAGE}@{table.RELEASE}"

SVG = (
    '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" color="black"'
    ' viewBox="{left} {top} {width} {height}">{body}</svg>'
)

Draw = Callable[[str], bytes]  # an SVG document -> a PNG file


@dataclass(frozen=True)
class Icon:
    """A drawing: its name in its set, what it shows, and its SVG document."""

    name: str
    label: str
    svg: str


@dataclass(frozen=True)
class IconSet:
    """The drawings of a set that show one of the classes, and whom they are by."""

    prefix: str
    attribution: str
    icons: tuple[Icon, ...]

    @property
    def split(self) -> str:
        """Returns the split that it is in."""
        return "test" if self.prefix in HELD_OUT else "train"


def read_sets(package: Path) -> list[IconSet]:
    """Returns the sets that may be used and their drawings of the classes, each drawing once.

    Raises:
      UserError: ``package`` is missing, or is not the archive that `table` names.
    """
    seen: set[str] = set()
    sets = []
    try:
        with package.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest != table.SHA256:
                raise UserError(f"{package} has the SHA-256 sum {digest}; expected {table.SHA256}; {GET_IT}")
            file.seek(0)
            with tarfile.open(fileobj=file, mode="r|gz") as archive:
                for member in archive:
                    if PurePosixPath(member.name).match("package/json/*.json"):
                        sets.append(_read_set(json.load(cast(IO[bytes], archive.extractfile(member))), seen))
    except OSError as error:
        raise UserError(f"cannot read {package}: {error.strerror}; {GET_IT}") from error
    return [found for found in sets if found.icons]


def icons_source(sets: Sequence[IconSet], data_dir: Path) -> Source:
    """Returns drawings as the source of ``icons``.

    The features are ``image``, a PNG of 64x64 pixels, black on white unless the set has colours; ``label``;
    and ``file_name``, which is ``<set>/<name>`` in the package.

    Args:
      sets: what `read_sets` returns.
      data_dir: the TFDS directory to prepare in.

    Raises:
      UserError: resvg-py is not installed.
    """
    draw = _renderer()
    info = dataset_info(
        data_dir,
        NAME,
        VERSION,
        file_features(sorted({icon.label for found in sets for icon in found.icons})),
        description="Icons of things by many designers; the sets of the test split are not in the other."
        f" From {table.PACKAGE} {table.RELEASE}:\n" + "\n".join(found.attribution for found in sets),
        homepage="https://iconify.design",
    )
    splits = tuple(
        _split(name, [found for found in sets if found.split == name], draw) for name in ("train", "test")
    )
    return Source(info, splits, fingerprint=hashlib.sha256(repr(sets).encode()).hexdigest())


def count_classes(sets: Sequence[IconSet]) -> dict[str, Counter[str]]:
    """Returns the number of drawings of each class in each split."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for found in sets:
        for icon in found.icons:
            counts[icon.label][found.split] += 1
    return dict(sorted(counts.items()))


def class_of(name: str) -> str | None:
    """Returns the class of a drawing by its name, such as ``house`` for ``home-outline-24``, or None."""
    words = re.split("[-_]", name)
    while len(words) > 1 and (words[-1] in ENDINGS or NUMBER.fullmatch(words[-1])):
        words.pop()
    while len(words) > 1 and words[0] in BEGINNINGS:
        words.pop(0)
    return _classes().get("-".join(words))


@cache
def _classes() -> dict[str, str]:
    """Returns the class of each name."""
    lines = [line.split() for line in table.CLASSES.split("\n") if line]
    return {name: names[0] for names in lines for name in names}


def _read_set(found: Mapping[str, Any], seen: set[str]) -> IconSet:
    prefix, about = found["prefix"], found["info"]
    licence, author = about["license"].get("spdx"), about["author"]
    by = f"{prefix}: {about['name']} by {author['name']}, {licence}, {author.get('url', 'no address')}"
    if licence not in table.LICENCES or about.get("category") in table.LEFT_OUT:
        return IconSet(prefix, by, ())
    return IconSet(prefix, by, tuple(_icons(found, seen)))


def _icons(found: Mapping[str, Any], seen: set[str]) -> Iterator[Icon]:
    """Yields the drawings of a set that show a class; adds them to those that are ``seen``.

    Of drawings whose names differ in a number, a size, only the largest is one.
    """
    largest: dict[str, tuple[int, str]] = {}
    for name in found["icons"]:
        size = max(map(int, re.findall(r"\d+", name)), default=0)
        key = re.sub(r"[-_]?\d+(px)?", "", name)
        largest[key] = max((size, name), largest.get(key, (0, "")))
    for _, name in sorted(largest.values()):
        icon = found["icons"][name]
        label, body = class_of(name), icon["body"]
        if label and body not in seen and not icon.get("hidden") and not UNDRAWABLE.search(body):
            seen.add(body)
            box = {side: icon.get(side, found.get(side, start)) for side, start in BOX.items()}
            yield Icon(name, label, SVG.format(**box, body=body))


def _split(name: str, sets: Sequence[IconSet], draw: Draw) -> SplitSource:
    count = sum(len(found.icons) for found in sets)
    parts = tuple(Part(f"{NAME}: {found.prefix}", partial(_examples, found, draw)) for found in sets)
    return SplitSource(name, count, count * TYPICAL_BYTES, parts)


def _examples(found: IconSet, draw: Draw) -> Iterator[tuple[Key, Example]]:
    for icon in found.icons:
        name = f"{found.prefix}/{icon.name}"
        yield name, {"image": draw(icon.svg), "label": icon.label, "file_name": name}


def _renderer() -> Draw:
    try:
        import resvg_py
    except ImportError:
        raise UserError(
            "drawing icons needs resvg-py, which is not installed; pip install 'bvit_jax[prepare]'"
        ) from None
    return lambda svg: resvg_py.svg_to_bytes(
        svg_string=svg, width=SIDE, height=SIDE, background="white", skip_system_fonts=True
    )
