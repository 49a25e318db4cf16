"""What a run leaves on disk: checkpoints with checksums, metrics, configuration, class names.

`checkpoint.Checkpoints` is written while a run goes on and read when it continues; `runs.load_model` reads a
run as a model. All of it is files below one directory that every process sees: this room touches those and
nothing else, and knows neither training nor how a run executes.
"""
