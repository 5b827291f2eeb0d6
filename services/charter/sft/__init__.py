"""SL-CAI: supervised learning on revised answers (Bai et al. 2022, section 3).

The model learns to give the revised answer at once, and its own answers to helpful prompts are mixed in, so
that it does not forget to help. `revisions` reads and chooses, `own` samples the model's own answers,
`examples` makes the data set, `training` is the run, `cli` the command.
"""
