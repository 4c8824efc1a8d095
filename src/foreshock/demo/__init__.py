"""A user's training script, faults that really hurt it, and the driver that shows what the watch makes of them.

`kernel`, `model`, `data` and `train` stand alone, as a user's own code would; only `driver` knows foreshock.
"""
