"""Binary vision transformers in JAX/Flax, numerically equal to their PyTorch originals."""
