"""Reports on runs and models: ``python -m bvit_jax.report COMMAND --help``

Training curves, pictures of a trained network, and tables of what a model costs; as PNG files, text, JSON
or an HTML page. Reads workdirs and checkpoints and uses every room below it; nothing but the command line
imports it. matplotlib (extra ``report``) is imported when something is drawn.
"""
