"""What a model costs, counted from its own program: parameters, products, operations, memory.

`cost_of` traces a model for one image and counts, of every layer:

- parameters, and what they take in memory packed and in float32. A parameter is binary where inference
  needs one bit of each of its elements: every product takes it as signs.
- multiply-accumulates, by whether the operands of the product are one bit an element. That follows from
  the program: an array of signs, or of whole numbers clipped to a range of one bit, keeps that through
  changes of layout and dtype (`bvit_jax.cost.values`).
- element-wise operations on what depends on the image: one an element of the result, of a reduction one
  an element of its input.
- activations kept for the backward pass, and the largest set alive in inference (`bvit_jax.cost.memory`).

What it cannot count, such as a loop whose length depends on data, it lists.
"""

from bvit_jax.cost.count import KINDS, LayerCost, ModelCost, Uncounted, cost_of

__all__ = ["KINDS", "LayerCost", "ModelCost", "Uncounted", "cost_of"]
