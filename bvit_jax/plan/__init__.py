"""What a run would cost, before it starts and without its chips.

`dry_run` compiles all programs of a run from shapes alone, for the devices here or a `topology`; `hlo`
reads what the compiler made of them; `fitting` finds the largest batch that fits. May use `training` and the
rooms below it; nothing here runs a step.
"""
