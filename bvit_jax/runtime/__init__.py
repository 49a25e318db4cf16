"""How a run executes: mesh, start of several processes, compilation ahead of time, chips, feed, interruption.

What changes the process as a whole is in `process`, and happens only where a command owns the process.
`arguments` is what commands share. This room may touch devices, threads, signals and the environment; it
knows no model, loss or data set.
"""
