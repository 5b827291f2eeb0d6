"""The sampler: prompts in, rollouts out, no faster than the trainer can use them."""
