"""The mathematics of PPO for language models: pure functions on tensors, no model, no I/O.

Everything lives on *slots*: the positions of a batch of answers at which something is learned, laid one
answer after the other in one flat dimension, so that there is no padding to mask. `lengths[i]` slots
belong to answer i. Most slots are *actions*, tokens that the policy drew; the boolean `acts` says which.

    slots     flat, sum(lengths)
    actions   the slots where acts is true
    answers   len(lengths)
"""
