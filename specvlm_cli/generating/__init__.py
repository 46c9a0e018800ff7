"""Worker processes that hold the models: one for each GPU, one video each at a time, each killable.

`messages.py` is what is said, `child.py` the worker's own side, `worker.py` the coordinator's.
"""
