"""A run on disk: open, resume, commit, and the fields of run.json."""
