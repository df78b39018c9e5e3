"""Calibration as the server does it: the pipeline, its jobs, and the depths in force."""
