"""Fixtures of the tests that run PyTorch code."""

import importlib
import json
import sys

import pytest

from bvit_jax.errors import UserError
from bvit_jax.parity import dump as dumping

# Modules of the stand-ins, and what the PyTorch side provides for them.
FOREIGN = ("models", "transformer", "timm", "Binary_plus", "lsq_plus", "_quan_base_plus", "_binary_base_plus")
FOREIGN += ("Bi_Quant", "bi_vision_transformer", "bi_swin_transformer")


@pytest.fixture
def clean_modules(monkeypatch):
    """Forgets, before and after, what checkouts have in common: names of modules and paths."""

    def forget():
        importlib.invalidate_caches()
        for name in [name for name in sys.modules if name.partition(".")[0] in FOREIGN]:
            del sys.modules[name]

    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    forget()
    yield forget
    forget()


@pytest.fixture
def in_process(clean_modules, monkeypatch):
    """Runs the PyTorch side in this process, which has imported PyTorch already.

    With one thread: models as small as these wait for the others longer than they compute.
    """
    import torch

    from bvit_jax.parity.torch_side.errors import Refused
    from bvit_jax.parity.torch_side.request import Request
    from bvit_jax.parity.torch_side.request import dump as write_golden_file

    def run(python, command, request, scratch):
        path = [*sys.path]
        try:
            resolved = Request(json.loads(json.dumps(request)))
            if command == "describe":
                return json.dumps(resolved.description())
            write_golden_file(resolved)
        except Refused as error:
            raise UserError(str(error)) from error
        finally:
            clean_modules()
            sys.path[:] = path
        return ""

    monkeypatch.setattr(dumping, "_run", run)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
