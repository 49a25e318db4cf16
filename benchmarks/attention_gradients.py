"""Draws the gradients of queries, keys and values of a binary attention, for scale 1 and the learned scale.

    python -m benchmarks.attention_gradients --png docs/images/bivit_gradients.png

Run it from the root of a checkout. The student of configs/bivit_digits.py starts from its teacher's
weights, its scales from the first batch; then the loss of one batch of digits, without the ranking term, is
differentiated with respect to the outputs of the linear layers of queries, keys and values. For each block:

- ``attended``: share of the probabilities that are binarised to 1. Only these pass a gradient on to a value.
- ``inside``: share of the probabilities in [0, α], to which the quantiser passes a gradient.
- ``query``, ``key``, ``value``: Euclidean norm of the gradient there, of one head of one image (mean square).
"""

import argparse
import json
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from bvit_jax import data
from bvit_jax.layers.dense import BitDense
from bvit_jax.losses.classification import training_loss
from bvit_jax.models.bivit.paper import FIRST_SCALE
from bvit_jax.runtime.mesh import replicate, shard_batch
from bvit_jax.training import initial
from bvit_jax.training.setup import Run, build, open_splits
from configs import bivit_digits

PARTS = ("query", "key", "value")
Figures = dict[str, list[float]]


def figures_of(learned_scale: bool, teacher: str) -> Figures:
    """Returns the figures of every block, at the start of training."""
    config = bivit_digits.get_config()
    config.model.learned_scale = learned_scale
    if teacher:
        config.teacher.path = teacher
    run = build(config, open_splits(config).num_examples)
    with closing(data.train_batches(config.data, config.model.image_size, config.batch_size, 0)) as batches:
        loaded = next(batches)
    batch = shard_batch({name: loaded[name] for name in ("image", "label")}, run.mesh)
    key = jax.random.key(0)
    given = initial.load(config, run.state.variables)
    state = run.programs.create.run(key, replicate(given.variables, run.mesh))
    assert run.programs.first_batch is not None  # these models start from a batch
    state = run.programs.first_batch.run(state, batch, key)
    return measure(run, state.variables, batch, config)


def measure(run: Run, variables: Any, batch: Any, config: Any) -> Figures:
    """Returns the figures of a model with these variables, on one batch."""
    images = run.teacher.normalize(batch["image"])  # type: ignore[misc]
    teacher: Any = run.teacher.model.apply(run.teacher.variables, images)  # type: ignore[union-attr]

    def loss(added: Any) -> tuple[Any, Any]:
        with nn.intercept_methods(_adding(added)):
            output: Any = run.model.apply(variables, images, capture=True)
        value, _ = training_loss(
            output.head_logits,
            batch["label"],
            teacher.logits,
            distillation_weight=config.loss.distillation_weight,
            label_smoothing=config.loss.label_smoothing,
            teacher_targets=config.loss.teacher_targets,
        )
        return value, (output.attentions, output.probabilities)

    count, tokens = images.shape[0], (config.model.image_size // config.model.patch_size) ** 2 + 2
    zeros = jnp.zeros((count, tokens, config.model.width))
    blocks = [f"block{i}" for i in range(config.model.depth)]
    gradients, (used, probs) = jax.jit(jax.grad(loss, has_aux=True))(
        {block: dict.fromkeys(PARTS, zeros) for block in blocks}
    )
    heads = count * config.model.num_heads
    figures: Figures = {
        part: [float(jnp.linalg.norm(gradients[block][part])) / heads**0.5 for block in blocks]
        for part in PARTS
    }
    scale = FIRST_SCALE / tokens if config.model.learned_scale else 1.0
    figures["attended"] = [float(jnp.mean(a > 0)) for a in used]
    figures["inside"] = [float(jnp.mean(p <= scale)) for p in probs]
    return figures


def _adding(added: Any) -> Callable[..., Any]:
    """Returns an interceptor that adds an array to what the layer of its name returns."""

    def intercept(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        output = call(*args, **kwargs)
        module = context.module
        if isinstance(module, BitDense) and module.name in PARTS and context.method_name == "__call__":
            return output + added[module.path[-2]][module.name]
        return output

    return intercept


def draw(results: dict[str, Figures], path: Path) -> None:
    """Draws shares and norms by block."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (shares, norms) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    blocks = np.arange(1, 1 + len(results["learned"]["query"]))
    words = {"attended": "binarised to 1", "inside": "in [0, α]"}
    for i, (kind, name) in enumerate({"fixed": "α = 1", "learned": "learned α, at its start"}.items()):
        figures, color = results[kind], f"C{i}"
        for share, style in {"inside": ":", "attended": "-"}.items():
            label = f"{words[share]}, {name}"
            shares.plot(blocks, figures[share], style, color=color, marker="o", ms=4, label=label)
        values = np.array([figures[part] for part in PARTS])
        mean = values.mean(axis=1)
        spread = np.abs(np.stack([values.min(axis=1), values.max(axis=1)]) - mean)
        places = np.arange(len(PARTS)) + 0.36 * (i - 0.5)
        norms.bar(places, mean, 0.34, yerr=spread, color=color, capsize=3, label=name)
    shares.set(xlabel="block", ylabel="share of the attention probabilities", ylim=(-0.03, 1.03))
    shares.set_xticks(blocks)
    shares.legend(loc="center right", bbox_to_anchor=(1, 0.64), fontsize=8)
    norms.set(xlabel="gradient at", ylabel="norm, of one head of one image")
    norms.set_xticks(range(len(PARTS)), PARTS)
    norms.ticklabel_format(axis="y", scilimits=(0, 0))
    norms.set_title("mean of the blocks, with the least and the largest", fontsize=9)
    norms.legend(fontsize=8, loc="upper center")
    norms.set_ylim(top=1.3 * max(max(f[part]) for f in results.values() for part in PARTS))
    for axis in (shares, norms):
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=130)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures both, draws, and prints JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--png", type=Path, help="where to draw it")
    parser.add_argument("--teacher", default="", help="in place of the one that ships with the package")
    options = parser.parse_args(argv)
    results = {"fixed": figures_of(False, options.teacher), "learned": figures_of(True, options.teacher)}
    if options.png:
        draw(results, options.png)
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
