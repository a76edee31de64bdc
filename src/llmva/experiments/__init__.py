"""Many methods, seeds or variants of one, measured on the same model, prompts and judge."""
