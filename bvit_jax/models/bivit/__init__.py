"""Bi-ViT: the layers that make `DeiT` and `Swin` of `bvit_jax.models` binary, in two forms.

`paper` is the method of the paper, `release` what the authors' code computes. Both quantise attention
(`attention`) and take learned values from the first batch of training. May import the other modules of
`bvit_jax.models` except the registry.
"""
