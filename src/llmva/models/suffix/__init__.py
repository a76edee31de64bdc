"""A short suffix after a request: where it stands, and how likely an opening of the answer is after it."""
