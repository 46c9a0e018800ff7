"""Data of the package: the weights of the demo models, and with an installed package the example clips.

`specvlm.packaged` finds them; `docs/demo-models.md` says how they were made.
"""
