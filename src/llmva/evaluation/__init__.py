"""Figures of a model on prompts: before and after an edit."""
