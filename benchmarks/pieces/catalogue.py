"""The pieces of the command, in the order of their value; the seconds are estimates for one H100."""

import importlib.util
from typing import Any

from benchmarks.pieces.piece import Piece

# What a piece may need, and the sentence that says what to do where it is missing.
NEEDS = {
    "reference": "the PyTorch code: add --reference CHECKOUT, and torch",
    "data": "ml-collections, grain, tensorflow-datasets, array-record, google-crc32c and scikit-learn:"
    " carry them as wheels, see benchmarks/accelerator.sh",
}
DATA_PACKAGES = ("ml_collections", "grain", "tensorflow_datasets", "array_record", "google_crc32c", "sklearn")
LEVERS: dict[str, dict[str, Any]] = {
    "remat=products": {"execution": {"remat": "products"}},
    "one_pass_norms": {"execution": {"one_pass_norms": True}},
    "scan_blocks": {"execution": {"scan_blocks": True}},
    "remat=dots": {"execution": {"remat": "dots"}},
    "remat=block": {"execution": {"remat": "block"}},
    "packed": {"execution": {"packed": True, "scan_blocks": True}},
    "float32, highest precision": {"dtype": "float32", "precision": "highest"},
    "without Triton's products": {"flags": "--xla_gpu_enable_triton_gemm=false"},
    "latency hiding": {"flags": "--xla_gpu_enable_latency_hiding_scheduler=true"},
    "no command buffers": {"flags": "--xla_gpu_enable_command_buffer="},
}
# Rows, inputs and outputs of products in stages of BinaryViT at 128 images.
SHAPES = ((401408, 64, 512), (25088, 256, 1024), (25088, 1024, 256))

ON_CPU = {"JAX_PLATFORMS": "cpu"}
DEVICE = Piece("device", "device", 20, "benchmarks.pieces.device:describe")


def found(need: str, reference: str) -> bool:
    """Returns whether this environment has what a piece needs."""
    if need == "data":
        return all(importlib.util.find_spec(name) is not None for name in DATA_PACKAGES)
    return need != "reference" or bool(reference and importlib.util.find_spec("torch"))


def pieces(reference: str) -> list[Piece]:
    """Returns the pieces of the full size."""
    binary = ["binaryvit", "react_deit", "bivit_deit", "bhvit_window3"]
    others = ["deit", "deit_distilled", "swin", "bivit_swin", "bivit_merging", "react_deit_steps"]
    settings = ["react_deit_avgpool", "bivit_deit_nodist"]
    settings += [f"binaryvit_{name}" for name in ("some_fp", "w1a32", "w4a1")]
    return [
        _golden("golden files", binary, 60),
        _ceilings(20, 1.0),
        _ours("binaryvit", 128, "bfloat16", 120, profile=True),
        _reference("binaryvit", 128, reference, 45),
        _reference("binaryvit", 128, reference, 150, compiled=True),
        _narrow("binaryvit", 60),
        _real_run(120, 45),
        _ours("binaryvit", 128, "float32", 120),
        _lever("remat=products", 128, 90),
        _ours("binaryvit", 256, "bfloat16", 120),
        _reference("binaryvit", 64, reference, 35),
        _codes(45, SHAPES),
        _golden("other families", others, 90),
        _lever("remat=products", 512, 90),
        *(_lever(name, 128, 90) for name in LEVERS if name not in ("remat=products", "packed")),
        _feed(60, 1280, 64, 3),
        _reference("binaryvit", 256, reference, 160, compiled=True),
        _ours("deit_small", 256, "bfloat16", 50),
        _ours("react_deit_small", 256, "bfloat16", 60),
        _ours("bivit_deit_small", 256, "bfloat16", 60),
        _ours("bhvit_small", 128, "bfloat16", 90),
        _golden("more settings", settings, 90),
        _reference("binaryvit", 64, reference, 40, autocast=False),
        _lever("packed", 128, 120),
    ]


TINY = {
    "image_size": 32,
    "num_classes": 10,
    "width": [8],
    "depth": [1],
    "num_heads": [1],
    "mlp_dim": [16],
    "reduction": [2],
}
TINY_DEIT = {"image_size": 32, "num_classes": 10, "width": 16, "depth": 1, "num_heads": 2, "mlp_dim": 32}


def quick_pieces(reference: str) -> list[Piece]:
    """Returns a trial of every kind of piece on a CPU: tiny models, one round."""
    once = {"rounds": 1, "steps": 1}
    return [
        _golden("golden files", ["bivit_merging", "deit"], 5),
        _ceilings(5, 0.0005),
        _ours("binaryvit", 4, "bfloat16", 10, settings=TINY, **once),
        _reference("deit_small", 2, reference, 10, settings=TINY_DEIT, **once),
        _ours("deit_small", 2, "float32", 10, settings=TINY_DEIT, **once),
        _narrow("react_deit", 10, precisions=["highest"]),
        _real_run(150, 2),
        _codes(5, ((16, 8, 8),)),
        _lever("remat=block", 4, 10, settings=TINY, **once),
        _feed(20, 64, 8, 1),
    ]


def _golden(name: str, files: list[str], seconds: int) -> Piece:
    return Piece("numbers", name, seconds, "benchmarks.pieces.numbers:golden", {"files": files})


def _narrow(file: str, seconds: int, **more: Any) -> Piece:
    arguments = {"file": file, **more}
    return Piece("numbers", f"narrow types: {file}", seconds, "benchmarks.pieces.numbers:narrow", arguments)


def _ceilings(seconds: int, scale: float) -> Piece:
    return Piece("speed", "ceilings", seconds, "benchmarks.pieces.speed:ceilings", {"scale": scale})


def _ours(model: str, batch: int, dtype: str, seconds: int, **more: Any) -> Piece:
    arguments = {"model": model, "batch": batch, "dtype": dtype, **more}
    return Piece(
        "speed", f"{model} {dtype}, batch {batch}", seconds, "benchmarks.pieces.speed:ours", arguments
    )


def _reference(model: str, batch: int, checkout: str, seconds: int, **more: Any) -> Piece:
    how = "compiled" if more.get("compiled") else "eager"
    how += ", float32" if more.get("autocast") is False else ""
    name = f"{model} PyTorch {how}, batch {batch}"
    arguments = {"model": model, "batch": batch, "checkout": checkout, **more}
    # Our model is only described there: the GPU belongs to PyTorch.
    return Piece("speed", name, seconds, "benchmarks.pieces.speed:reference", arguments, ON_CPU, "reference")


def _lever(name: str, batch: int, seconds: int, **more: Any) -> Piece:
    lever = {"dtype": "bfloat16", **LEVERS[name]}
    flags = lever.pop("flags", "")
    arguments = {"model": "binaryvit", "batch": batch, "kinds": ["training"], **lever, **more}
    environment = {"XLA_FLAGS": flags} if flags else {}
    return Piece(
        "levers", f"{name}, batch {batch}", seconds, "benchmarks.pieces.speed:ours", arguments, environment
    )


def _codes(seconds: int, shapes: Any) -> Piece:
    return Piece(
        "levers", "types of the codes", seconds, "benchmarks.pieces.codes:products", {"shapes": shapes}
    )


def _real_run(seconds: int, epochs: int) -> Piece:
    # Its own process is on the CPU; the runs that it starts use the device.
    return Piece(
        "run", "digits", seconds, "benchmarks.pieces.real_run:digits", {"epochs": epochs}, ON_CPU, "data"
    )


def _feed(seconds: int, images: int, batch: int, rounds: int) -> Piece:
    arguments = {"images": images, "batch": batch, "rounds": rounds}
    return Piece(
        "feed", "photographs", seconds, "benchmarks.pieces.feed:photographs", arguments, ON_CPU, "data"
    )
