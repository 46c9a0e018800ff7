"""The demo models: draw clips, train the pairs, evaluate and export them. See docs/demo-models.md."""
