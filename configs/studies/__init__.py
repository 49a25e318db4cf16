"""The studies of ``bvit ablate``, one per file with a function ``get_study``."""
