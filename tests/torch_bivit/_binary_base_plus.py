"""What the quantisers of Bi-ViT's stand-in share."""


def grad_scale(x, scale):
    """Returns x, with its gradient times a scale; rounded, as the code has it."""
    scaled = x * scale
    return x.detach() - scaled.detach() + scaled
