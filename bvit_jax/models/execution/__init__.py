"""How a model runs, which is no part of what it is: rematerialisation, scans, integer products, packed signs.

`choice` decides it for a run, `stages` runs the blocks of a model, `variants` are the steps between products
in the forms that suit a device, `packed_feed_forward` keeps a branch in the caches of a CPU. May import
`bvit_jax.layers` and `bvit_jax.binary`; only `choice` knows the registry of models.
"""
