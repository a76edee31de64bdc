"""The edit as something to ship: an adapter, a merged checkpoint, a list of what changes, a model card, an upload."""
