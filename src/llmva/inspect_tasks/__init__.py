"""Tasks for Inspect AI: over-refusal and harmful requests, on our prompts and by our judges."""
