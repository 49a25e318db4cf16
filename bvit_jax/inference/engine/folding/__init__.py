"""How each family is folded: one file with ``fold(config, params, statistics)``, all in float64.

`values` has what they share. The order of folding is in `bvit_jax.inference.engine.fold`.
"""
