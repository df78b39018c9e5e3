"""The page at `/`: static files that ask the documented HTTP routes, and nothing of the server itself."""
