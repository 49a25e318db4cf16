"""The report on what a model costs, as JSON and as text."""

import dataclasses
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from ml_collections import ConfigDict

from bvit_jax import config as config_lib
from bvit_jax import models, weights
from bvit_jax.cost import KINDS, LayerCost, ModelCost, cost_of
from bvit_jax.cost.speedup import speedups
from bvit_jax.report.text import megabytes, short, table
from bvit_jax.workdir import runs


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model to report on.

    Attributes:
      model: its name and settings.
      compute_dtype: dtype of its activations.
      remat: what its backward pass recomputes in training.
    """

    model: ConfigDict
    compute_dtype: str = "float32"
    remat: str = "none"


def subject_of(config: ConfigDict) -> Subject:
    """Returns the model of an experiment."""
    remat = "none" if config.remat == "auto" else config.remat
    return Subject(config.model, config.compute_dtype, remat)


def read_subject(path: Path) -> Subject:
    """Returns the model of a training run, or of any checkpoint that `bvit_jax.weights.load` reads.

    Raises:
      UserError: there is none.
    """
    if runs.is_run(path):
        return subject_of(config_lib.load(path / "config.json"))
    return Subject(weights.load(path).config)


def measure(subject: Subject, *, training: bool = True) -> ModelCost:
    """Returns what a model costs; raises `UserError` where its settings are wrong."""
    dtype = jnp.dtype(subject.compute_dtype)
    model = models.create_model(subject.model, dtype)
    trained = models.create_model(subject.model, dtype, models.Execution(remat=subject.remat))  # type: ignore[arg-type]
    return cost_of(model, subject.model.image_size, training=training, trained=trained)


def figures(subject: Subject, depth: int = 0) -> dict[str, Any]:
    """Returns the report as values of JSON.

    Args:
      subject: the model.
      depth: deeper modules are added to the one above them; 0 lists every module.

    Returns:
      ``model``, ``image_size``, ``compute_dtype``, ``remat``; ``total`` and ``layers``, each with the
      figures of `bvit_jax.cost.LayerCost`; ``packed_bytes_by_kind``, by the class of module;
      ``training_bytes`` and ``inference_bytes`` of activations per image; ``uncounted``; and for a model
      with a real-valued backbone ``speedups`` (`bvit_jax.cost.speedup.Speedup`).

    Raises:
      UserError: a setting of the model is wrong.
    """
    cost = measure(subject)
    name = subject.model.name
    report: dict[str, Any] = {
        "model": name,
        "image_size": subject.model.image_size,
        "compute_dtype": subject.compute_dtype,
        "remat": subject.remat,
        "total": _layer(cost.total),
        "packed_bytes_by_kind": _packed_by_kind(cost),
        "training_bytes": cost.total.saved_bytes,
        "inference_bytes": cost.inference_bytes,
        "uncounted": [dataclasses.asdict(item) for item in cost.uncounted],
    }
    backbone = models.real_backbone(subject.model)
    if backbone is not None:
        real = measure(Subject(backbone, subject.compute_dtype), training=False)
        report["backbone"] = backbone.name
        report["speedups"] = [dataclasses.asdict(item) for item in speedups(cost, real)]
    report["layers"] = [_layer(layer) for layer in cost.grouped(depth)]
    return report


_DERIVED = (  # properties of `LayerCost`
    "params",
    "packed_bytes",
    "float_bytes",
    "elementwise",
    "ops",
    "ops_with_elementwise",
    "macs_per_byte",
    "macs_per_packed_byte",
)


def _layer(layer: LayerCost) -> dict[str, Any]:
    values = dataclasses.asdict(layer)
    values["macs"] = {kind: layer.macs[kind] for kind in KINDS}
    values["elementwise_by"] = dict(layer.elementwise_by)
    for name in _DERIVED:
        values[name] = getattr(layer, name)
    return values


def _packed_by_kind(cost: ModelCost) -> dict[str, dict[str, int]]:
    """Returns the bytes of the packed model by class of module and by what they store."""
    kinds: dict[str, dict[str, int]] = {}
    for layer in cost.layers:
        if not layer.params:
            continue
        kind = kinds.setdefault(layer.kind, {"signs": 0, "scales": 0, "few_bits": 0, "float32": 0})
        kind["signs"] += -(-layer.binary_params // 8)
        kind["scales"] += 4 * layer.scales
        kind["float32"] += 4 * layer.real_params
        others = layer.packed_bits - layer.binary_params - 32 * (layer.scales + layer.real_params)
        kind["few_bits"] += -(-others // 8)
    return dict(sorted(kinds.items(), key=lambda item: -sum(item[1].values())))


# --- for people --------------------------------------------------------------------------------


def as_text(report: dict[str, Any], columns: int = 0) -> str:
    """Returns the report of `figures` as text: the sums, then the layers.

    Args:
      report: the figures.
      columns: the table of the layers leaves out what does not fit into so many; 0 for all of it.
    """
    parts = [
        f"{report['model']}, {report['image_size']}×{report['image_size']} pixels, one image,"
        f" {report['compute_dtype']}",
        _parameters(report),
        _operations(report),
        _memory(report),
    ]
    if "speedups" in report:
        parts.append(speedup_table(report["speedups"], report["backbone"]))
    parts.append(_uncounted(report["uncounted"]))
    parts.append(_layers_table(report["layers"], report["total"], columns))
    return "\n\n".join(parts) + "\n"


# Columns of the table of layers, in the order in which they are left out.
_LEAST = (
    *("float32 kB", "1-bit input", "1-bit weight", "MACs/byte", "saved kB", "element-wise"),
    *("other params", "module", "real MACs", "binary MACs", "packed kB", "binary params"),
)


def _layers_table(layers: list[dict[str, Any]], total: dict[str, Any], columns: int) -> str:
    head = (
        "layer",
        "module",
        "binary params",
        "other params",
        "packed kB",
        "float32 kB",
        "binary MACs",
        "1-bit weight",
        "1-bit input",
        "real MACs",
        "element-wise",
        "saved kB",
        "MACs/byte",
    )
    rows = []
    for layer in [*layers, total]:
        macs = layer["macs"]
        rows.append(
            (
                layer["path"] or "(model)",
                layer["kind"],
                f"{layer['binary_params']:,}",
                f"{layer['params'] - layer['binary_params']:,}",
                f"{layer['packed_bytes'] / 1e3:,.1f}",
                f"{layer['float_bytes'] / 1e3:,.1f}",
                *(f"{macs[kind]:,}" for kind in ("binary", "binary_weight", "binary_input", "real")),
                f"{layer['elementwise']:,}",
                f"{layer['saved_bytes'] / 1e3:,.1f}",
                f"{layer['macs_per_byte']:.1f}",
            )
        )
    return _fitting(head, rows, columns)


def _fitting(head: Sequence[str], rows: Sequence[Sequence[str]], columns: int) -> str:
    """Returns the table without the columns for which there is no room, and says which."""
    text, left_out = table(head, rows, left=2), 0
    while columns and max(map(len, text.splitlines())) > columns and left_out < len(_LEAST):
        left_out += 1
        kept = [i for i, name in enumerate(head) if name not in _LEAST[:left_out]]
        shown = [[row[i] for i in kept] for row in (head, *rows)]
        text = table(shown[0], shown[1:], left=2 if 1 in kept else 1)
    if left_out:
        names = f"left out, as the terminal is too narrow: {', '.join(_LEAST[:left_out])}; see --json"
        text += "\n\n" + textwrap.fill(names, columns)
    return text


def _parameters(report: dict[str, Any]) -> str:
    total = report["total"]
    return (
        "parameters\n"
        f"  {total['params']:,}: {total['binary_params']:,} binary, {total['low_bit_params']:,} of 2 to 8"
        f" bits, {total['real_params']:,} real\n"
        f"  {total['statistics']:,} running statistics in addition\n"
        f"  {megabytes(total['packed_bytes'])} packed, {megabytes(total['float_bytes'])} in float32;"
        f" packed, by module:\n{_packed_table(report['packed_bytes_by_kind'])}"
    )


def _packed_table(kinds: dict[str, dict[str, int]]) -> str:
    head = ("  module", "signs kB", "their scales kB", "few bits kB", "float32 kB")
    names = ("signs", "scales", "few_bits", "float32")
    rows = [(f"  {kind}", *(f"{parts[name] / 1e3:,.1f}" for name in names)) for kind, parts in kinds.items()]
    return table(head, rows, left=1)


_MAC_KINDS = {
    "binary": "binary",
    "binary_weight": "binary weights, real input",
    "binary_input": "binary input, real weights or weights of several bits",
    "real": "real",
}


def _operations(report: dict[str, Any]) -> str:
    total = report["total"]
    macs = {text: total["macs"][kind] for kind, text in _MAC_KINDS.items()}
    return (
        f"multiply-accumulates (MACs)\n{_counts(macs)}\n"
        f"  {short(total['ops'])} OPs: binary / 64 + all others\n"
        f"  {total['macs_per_byte']:.1f} MACs per byte of operands and results as computed,\n"
        f"  {total['macs_per_packed_byte']:.1f} with binary operands packed\n\n"
        f"element-wise operations\n{_counts(total['elementwise_by'])}\n"
        f"  {short(total['ops_with_elementwise'])} OPs with them"
    )


def _counts(counts: dict[str, int]) -> str:
    largest = sorted(counts.items(), key=lambda item: -item[1])
    return "\n".join(f"  {short(count):>12}  {what}" for what, count in largest if count)


def _memory(report: dict[str, Any]) -> str:
    return (
        "activations of one image\n"
        f"  saved for the backward pass: {megabytes(report['training_bytes'])} (remat: {report['remat']})\n"
        f"  largest set alive in inference, unfused: {megabytes(report['inference_bytes'])}"
    )


def speedup_table(items: list[dict[str, Any]], backbone: str) -> str:
    """Returns the comparison with the real-valued backbone as text.

    Args:
      items: the fields of each `bvit_jax.cost.speedup.Speedup`.
      backbone: its name.
    """
    head = ("  counted", "real MACs", "OPs", "quotient", "rounded")
    rows = []
    for item in items:
        rounded = item["rounded_ratio"]
        rows.append(
            (
                f"  {item['convention']}",
                short(item["macs"]),
                short(item["ops"]),
                f"{item['ratio']:.2f}",
                "-" if rounded is None else f"{rounded:.2f}",
            )
        )
    title = f"speed-up over the real-valued {backbone} of the same sizes"
    rounded = "  rounded: the quotient of both counts rounded to 0.01 G"
    return f"{title}\n{rounded}\n{table(head, rows, left=1)}"


def _uncounted(items: list[dict[str, Any]]) -> str:
    if not items:
        return "uncounted: nothing"
    lines = [
        f"  {item['path'] or '(model)'}: {item['what']}, {item['elements']:,} elements" for item in items
    ]
    return "\n".join(["uncounted, in no figure above:", *lines])
