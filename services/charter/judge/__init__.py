"""The judge: says which of two answers follows the constitution better, as a probability."""
