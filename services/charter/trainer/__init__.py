"""Teaches the policy: proximal policy optimisation over rollouts that an older policy may have made.

`algorithm` is the mathematics (pure functions), `update` one PPO step, `worker` the service on the bus.
"""
