"""Measure a model on prompts before and after an edit."""
