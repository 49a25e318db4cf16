"""Reports about runs and models, for people and for programs; the command is `bvit_jax.report.__main__`."""
