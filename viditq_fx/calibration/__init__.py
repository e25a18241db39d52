"""Calibration: what a model's sites see while it samples, and the Recipe that follows from it."""
