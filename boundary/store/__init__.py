"""What is kept of calibration, for many processes at once: records, activations, jobs, audit."""
