"""What a model costs, counted from its own program: parameters, products, operations, memory.

`cost_of` traces a model for one image and counts, of every layer:

- parameters, and their size in memory, packed and in float32. A parameter is binary if inference needs one
  bit per element of it: every product takes it as signs.
- multiply-accumulates, by whether the operands of the product have one bit per element. That follows from
  the program: an array of signs, or of integers clipped to a range of one bit, stays one through changes of
  layout and dtype (`bvit_jax.cost.values`).
- element-wise operations on values that depend on the image: one per element of the result, or of the input
  for a reduction.
- activations saved for the backward pass, and the largest live set in inference (`bvit_jax.cost.memory`).

Whatever it cannot count, such as a loop whose length depends on data, it lists. Reads models, runs nothing.
"""

from bvit_jax.cost.count import KINDS, LayerCost, ModelCost, Uncounted, cost_of

__all__ = ["KINDS", "LayerCost", "ModelCost", "Uncounted", "cost_of"]
