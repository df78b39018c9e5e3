"""A finished calibration, shown: a table, a page, a drawing, JSON."""
