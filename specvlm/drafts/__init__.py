"""Drafts: what guesses the next tokens. One file each, behind the contract in `base`."""
