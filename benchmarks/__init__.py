"""Benchmarks, each a command: ``python -m benchmarks.train_step --help``, from the root of a checkout.

`train_step` compares with the PyTorch code, `ceilings` and `roofline` say what the machine could do,
`topologies` asks the TPU compiler, and `accelerator` runs what matters on a GPU; the others measure one
thing each. Those of the step (`workload`, `measure`, `jax_side`, `torch_side`) import nothing of
`bvit_jax.data`, so that they run on a bare GPU machine with jax, flax, optax and torch.
"""
