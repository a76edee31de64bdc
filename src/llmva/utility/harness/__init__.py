"""Task files for lm-evaluation-harness: over-refusal and attack success on the sets of the registry."""
