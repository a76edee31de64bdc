"""A run on disk: what resumes it and what it reports."""
