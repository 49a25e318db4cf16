"""On a process's path, it hides PyTorch: tensorboardX would import it for two seconds and not use it."""

raise ImportError("PyTorch is hidden from this process")
