"""Our PPO beside TRL 1.12.0's on the same frozen rollouts; TRL runs in an environment of its own."""
