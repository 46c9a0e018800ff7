"""Training of heads as a job: videos read ahead, captions kept, a folder that can be gone on with.

The loop and the weights are the library's (`specvlm.training`); this package gives it samples.
"""
