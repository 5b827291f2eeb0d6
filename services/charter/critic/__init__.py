"""The critic: reads an answer against the constitution, says what is wrong with it, and revises it."""
