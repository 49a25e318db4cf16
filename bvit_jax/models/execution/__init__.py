"""How a model runs, which is no part of what it is: rematerialisation, scans, integer products, packed signs.

`stages` runs the blocks of a model, `variants` are the steps between products as they suit a device, and
`packed_feed_forward` keeps a branch in the caches of a CPU. `bvit_jax.models.choice` decides which a run
uses. May import `bvit_jax.layers` and `bvit_jax.binary`.
"""
