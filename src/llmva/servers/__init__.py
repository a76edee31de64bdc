"""OpenAI-compatible servers, as those who ask them see them."""
