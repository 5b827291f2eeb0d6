"""`charter demo`: the whole circle once, from a fresh state to figures, curves and samples."""
