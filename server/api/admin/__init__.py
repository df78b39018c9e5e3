"""The /admin routes: adapters, calibration jobs, boundaries and the audit trail."""
