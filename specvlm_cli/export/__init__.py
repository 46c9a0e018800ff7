"""Turning a run folder into one tidy dataset: merge the shards, write in a format, publish all of it or nothing.

request.py    what can be asked for
merge.py      all shards -> each caption once, in one order
columns.py    which columns, with which types
names.py      video paths -> names of files that stay inside the destination
staging.py    written next to the destination, renamed at the end
manifest.py   what an export wrote, and how an earlier export is recognised
parquet.py lines.py sidecars.py videofolder.py   the formats
card.py       the dataset card
write.py      one export, from request to result
"""
