"""The seed model and its world: a toy whose ground truth is known, so that improvement can be measured.

`world` writes requests, `answers` writes and reads answers, `oracle` says what an answer is, `corpus`
writes the training text, `recipe` makes the weights. Only measurements may read the oracle.
"""

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
"""The shipped model, in Hugging Face format."""

__all__ = ["WEIGHTS"]
