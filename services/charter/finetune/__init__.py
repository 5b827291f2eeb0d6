"""What supervised fine-tuning and reward modelling share: both are runs of TRL's trainers.

`config` says how weights are tuned, `checkpoints` reads tokenizers and writes folders whole or not at all,
`tokens` turns conversations and answers into ids, `run` builds TRL's arguments and callbacks. Only `run`
imports torch, transformers and trl, and nothing here imports `run` before a training starts.
"""
