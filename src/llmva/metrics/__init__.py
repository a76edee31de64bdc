"""Rates of answers, what a run optimises, and the points that no other beats."""
