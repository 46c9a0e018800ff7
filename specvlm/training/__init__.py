"""Training of draft heads: what the frozen target shows of a captioned video, the losses, the loop."""
