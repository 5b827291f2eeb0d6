"""The prompt source: which prompts the policy is asked next."""
