"""What calibration costs: its sweep beside one pass a depth, its memory, its neighbours' latency."""
