"""HTTP: wire models, routes, server-sent events. Runs on the event loop and imports no torch."""
