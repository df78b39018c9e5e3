"""`python -m server.bench.gpu`: is the decode path of a GPU right, and how far is it from its limits?"""
