"""Plan search: which arrangement of ranks runs a program fastest, found without running anything.

found = moec.search(model, "a100x256", objective="latency", plan="moe", batch=256)
print(found)                    # the best plan, the runners-up, and why each lost
moec.compile(model, found.best.plan, world=found.best.arrangement.world)

`arrangements` lists what there is to try, `folding` and `lowering` make costs of it without lowering every
layer, `reasons` says why one lost to another.
"""
