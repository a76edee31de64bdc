"""Experiments: several methods, seeds or variants on the same model, prompts and judge."""
