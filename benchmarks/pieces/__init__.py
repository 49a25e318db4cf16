"""The pieces of `benchmarks.accelerator`, each run in a process of its own.

`catalogue` lists them in the order of their value, `process` runs one and `__main__` is that process. What
they do is in `device`, `numbers`, `speed`, `codes`, `real_run` and `feed`; `summary` makes a table of it.
"""
