"""Measuring: rates with intervals, on held-out requests. Only this folder and the benches read the oracle."""
