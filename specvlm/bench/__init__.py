"""Measuring: the same videos, the same process, one method after the other.

`records.py` says what is measured, `measure.py` times one caption and sums up many, `suite.py` runs the methods
in turn. Import them by name: this file imports nothing, so that records are had without torch.
"""
