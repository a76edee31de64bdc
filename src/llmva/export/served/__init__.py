"""Whether a server that somebody runs serves the edit."""
