"""How things that ship with the package were made. Run from a checkout; nothing here is installed."""
