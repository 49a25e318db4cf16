"""The inference engine: networks whose every binary product counts bits, with everything foldable folded.

`operations` are the steps that a family is made of; another implementation of them need only take their
place. Runs with JAX alone: no Flax, no configuration library.
"""
