"""Passes over many rows of tokens: what they share is read once, and rows leave and join while answers are written."""
