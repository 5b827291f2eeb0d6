"""The circle: all learning services of one machine, put together and taken through their phases.

Revisions → SL-CAI → a first reward model → PPO without end, each candidate gated before it serves. Like
`charter.app`, this part composes services and is none itself; `charter demo` and `charter run` both use it.
"""
