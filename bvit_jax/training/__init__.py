"""How a run trains: `loop.train_and_evaluate` from top to bottom, and what it is built from.

`setup` turns a configuration into a `Run`; `steps` holds its compiled programs; `record` is what a run
carries from step to step in addition to its arrays, `run_log` what it reports; `evaluation`, `teacher` and
`initial` (weights to start from) do what they are called. May use every room from `runtime` down.
"""
