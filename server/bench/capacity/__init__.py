"""How many replicas serve a load, on paper: measured step costs, a simulator, and a run to check it by."""
