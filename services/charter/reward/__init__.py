"""The reward model: learns from soft labels while it serves, and scores answers.

    preferences ─► worker ─► labels.db ─► learner (a process of its own: TRL) ─► rounds/N
                                                                                   │ is it better?
    Score ◄── server ◄── scorer ◄────────────── the registry ◄─────────────────────┘

A round trains on a window of the newest labels and a replay of older ones, starting from the model in force,
and is measured on held-out prompts beside it. `window`, `augment`, `measure` and `promotion` are pure.
"""
