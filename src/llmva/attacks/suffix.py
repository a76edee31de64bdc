"""The attack by words after the request, which a search over suffixes finds for one request and one model."""

from __future__ import annotations

import hashlib

from llmva.attacks.base import Attack, Frame

NAME = "suffix"


def suffix_attack(suffix: str) -> Attack:
    """The request with `suffix` after it; the name tells suffixes apart, since one request may have several."""
    frame = Frame(tail=f" {suffix}")
    return Attack(
        f"{NAME}:{hashlib.sha256(suffix.encode()).hexdigest()[:8]}",
        "puts words after the request that a search over suffixes chose",
        "Zou et al. 2023, arXiv 2307.15043",
        frame.around,
        frame.inside,
    )
