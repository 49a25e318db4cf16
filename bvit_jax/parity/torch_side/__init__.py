"""The other side of ``parity dump``: runs the PyTorch code on one batch and records what it computes.

    python torch_side {describe,dump} REQUEST.json

A program for the Python of the PyTorch code (3.9 or later, PyTorch 2.5 or later): it imports the standard
library, numpy, PyTorch and the checkout, and nothing of bvit_jax. ``describe`` prints what must be known
before images are made, ``{"image_size": ...}``. A request that cannot be met is one line on stderr and exit
status 2. Each code is one file with a subclass of `subject.Subject`, listed in ``codes.py``.

A request has ``code`` (its name), ``repo``, ``settings`` (the arguments of the PyTorch code, or null for
those of the checkpoint), ``overrides`` of them and of its config.json, ``checkpoint`` (a file or null),
``images`` (an .npy file, (batch, 3, size, size), or null for random ones), ``batch``, ``seed``, ``compact``
and ``out``.
"""
