"""Faults at full size, by hand: each module is a script that ends with a code other than 0 where something broke."""
