"""What critic and judge share: the questions, how a model is asked them, and what comes back."""
