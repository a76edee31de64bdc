"""Attacks: transforms of prompts under which a model may answer what it refuses, or refuse what it answers.

Each is small, deterministic and published, says nothing operational, and can be read back (docs/attacks.md). Toxic and
benign prompts go through the same transforms: an edit that refuses all that is in Base64 has learnt the wrong thing.
"""

from llmva.attacks.base import Attack
from llmva.attacks.registry import bundled_attacks, parse_attacks

__all__ = ["Attack", "bundled_attacks", "parse_attacks"]
