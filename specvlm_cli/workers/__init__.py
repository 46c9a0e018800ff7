"""Worker processes that hold the models: one for each GPU, one video each at a time, each killable.

`messages.py` is what is said, `child.py` and `preparing.py` the worker's own side, `worker.py` and `crew.py` the
coordinator's.
"""
