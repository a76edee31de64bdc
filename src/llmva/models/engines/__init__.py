"""What writes answers: transformers, in `models.generate`, or an engine beside it."""
