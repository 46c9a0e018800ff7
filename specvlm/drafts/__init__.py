"""Drafts propose the next tokens. One file each, behind the contract in `base`."""
