"""The documents: pages to read, and what writes those that say what the code says already."""
