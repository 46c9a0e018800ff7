"""What a person sees of a run: words for numbers, how far it is, the live display, the log file, the report."""
