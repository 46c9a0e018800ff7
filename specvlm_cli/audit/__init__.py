"""The audit of a run: captions made again by stock `generate()`, and compared with the rows.

It reads ledgers as any other reader does, and writes into OUT/audit alone.
"""
