"""What this project knows about a model beyond its arrays, as JSON that travels with them.

A native ``config.json`` is such a document; files of other formats hold it under the key ``bvit_jax``.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from bvit_jax.errors import UserError
from bvit_jax.models import current_name
from bvit_jax.weights.preprocessing import Preprocessing

KEY = "bvit_jax"  # in the files of other formats, and the value of "format" in ours
# Settings added later, whose default changes nothing and is not written: older versions read the files too.
LATER = {"estimator": "parabola"}


@dataclass(frozen=True)
class Document:
    """A description of a model.

    Attributes:
      naming: the format whose names the arrays have.
      model: the model's name and settings.
      preprocessing: from an image file to the model's input.
      class_names: one per class.
      history: the files that the weights came from, oldest first: name, SHA-256, format.
      bookkeeping: the format of the arrays that are kept for the way back to PyTorch.
      digest: SHA-256 of the weights that it describes.
    """

    naming: str
    model: Mapping[str, Any]
    preprocessing: Preprocessing
    class_names: tuple[str, ...]
    history: tuple[Mapping[str, Any], ...]
    bookkeeping: str
    digest: str

    def to_json(self) -> dict[str, Any]:
        """Returns the document as a JSON object."""
        return {
            "format": KEY,
            "version": version("bvit_jax"),
            "naming": self.naming,
            "model": {key: value for key, value in self.model.items() if LATER.get(key) != value},
            "preprocessing": dataclasses.asdict(self.preprocessing),
            "class_names": list(self.class_names),
            "history": [dict(entry) for entry in self.history],
            "bookkeeping": self.bookkeeping,
            "digest": self.digest,
        }


def find_document(values: Mapping[str, Any], origin: str) -> Document | None:
    """Returns the document in the content of a ``config.json``, or None if there is none.

    Raises:
      UserError: it is damaged; the message starts with ``origin``.
    """
    found = values if values.get("format") == KEY else values.get(KEY)
    if found is None:
        return None
    try:
        return _parse(found)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{origin}: its description of the model is damaged: {reason}") from error


def _parse(values: Mapping[str, Any]) -> Document:
    document = Document(
        naming=values["naming"],
        model={**_tuples(values["model"]), "name": current_name(values["model"]["name"])},
        preprocessing=Preprocessing(**_tuples(values["preprocessing"])),
        class_names=tuple(values["class_names"]),
        history=tuple(dict(entry) for entry in values["history"]),
        bookkeeping=values["bookkeeping"],
        digest=values["digest"],
    )
    texts = (document.naming, document.bookkeeping, document.digest, document.model["name"])
    if not all(isinstance(text, str) and text.isprintable() for text in (*texts, *document.class_names)):
        raise TypeError("a name in it is not one line of text")
    return document


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
