"""The /admin routes: adapters, calibration jobs, boundaries, keys, usage and the audit trail."""
