"""Fathom as a Ray Serve application: replicas, the router between them, and what runs at the door."""
