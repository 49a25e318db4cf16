"""Studies: runs that differ in one thing each, repeated with several seeds, and what their differences say.

``bvit ablate STUDY``. A `Study` names the runs; `runs` trains what is missing, `comparison` compares,
`table` and `figure` show it. A study is a file of ``configs/studies``.
"""

from bvit_jax.ablation.study import Study

__all__ = ["Study"]
