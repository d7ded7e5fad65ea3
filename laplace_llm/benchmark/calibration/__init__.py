"""Calibration of each method's predictions, on one's own model and task."""
