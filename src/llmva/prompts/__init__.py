"""Labelled prompts: the bundled set, and loaders for files and data sets."""

from llmva.prompts.load import load_prompts
from llmva.prompts.prompt_set import PromptSet
from llmva.prompts.types import Prompt

__all__ = ["Prompt", "PromptSet", "load_prompts"]
