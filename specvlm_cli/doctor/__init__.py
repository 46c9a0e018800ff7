"""What is wrong with this machine, and how to fix it.

checks.py     one check at a time, each with a time limit, none of which can end the others
machine.py    Python, packages, processors, memory, limits, the job that we are part of
storage.py    the model cache; the file system of a run folder
reading.py    a small video, read by each reader in a killable process
models.py     devices, and a tiny generation, in a process of its own (`probe.py`)
examination.py   which checks there are, in which order
"""
