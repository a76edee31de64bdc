"""Public prompt sets that are known by name: what they are, and which of them a user named."""
