"""``icons``: pictures of 237 things by the designers of 176 icon sets; whole sets are held out.

A class is a thing, such as an umbrella, and an example is how one set draws it. So accuracy on the held-out
split is that on designers who were never seen. `table` names the classes and the held-out sets.
"""

from bvit_jax.data.prepare.icons.drawings import count_classes, icons_source, read_sets

__all__ = ["count_classes", "icons_source", "read_sets"]
