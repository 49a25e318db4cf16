"""The compiled programs of a run, as pure functions; `programs.Programs` is the one list of them.

Each file holds one program: what it computes, from arrays to arrays. `batch` and `keys` hold what several of
them share, so that every program sees the images and the random numbers of the training step. Nothing here
reads or writes a file.
"""
