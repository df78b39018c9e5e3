"""Steps without the Python of the model: noted once, then replayed on a CPU or recorded on a GPU."""
