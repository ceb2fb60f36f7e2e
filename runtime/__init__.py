"""What a program needs to run: operators, training, checkpoints, generation; imported as `moec.runtime`.

This file imports nothing, so that `moec.runtime.ops`, the lowest floor, can be imported alone.
"""
