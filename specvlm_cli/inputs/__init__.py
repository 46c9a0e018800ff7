"""INPUT arguments to items: folders, files, globs, stdin and manifests in, one item for each video out."""
