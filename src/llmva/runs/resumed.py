"""What is asked of a run that goes on elsewhere than it began: does the model still answer as it did?"""

from __future__ import annotations

from llmva.errors import UsageError
from llmva.method.context import Context
from llmva.models.thinking import answer_after_thoughts
from llmva.runs.run import Run

ANSWERS = 8  # that are asked for again
OPENING = 24  # characters of each that are compared: further on, rounding alone may lead to other words


def check_resumed(context: Context, run: Run) -> list[str]:
    """Sentences on what is not as it was when `run` began, for the log; a run that goes on also keeps them as limits.

    Where other versions compute, some of the first iteration's answers are asked for again. Raises UsageError where
    most of them begin otherwise than they did.
    """
    if not run.notes:
        return []
    sentences = [f"This run goes on where {'; '.join(run.notes)}."]
    if run.elsewhere:
        asked, other = _answers_again(context, run)
        if other * 2 > asked:
            raise UsageError(
                f"'{run.directory}' holds a run whose model answered otherwise ({other} of {asked} answers; "
                f"{'; '.join(run.elsewhere)}): go back to what it began with, or pass --restart to discard it."
            )
        sentences.append(f"{asked - other} of {asked} of its first answers begin as they did.")
    if not run.record.get("test", {}).get("after"):
        run.record["limits"] += [sentence for sentence in sentences if sentence not in run.record["limits"]]
    return sentences


def _answers_again(context: Context, run: Run) -> tuple[int, int]:
    """How many validation prompts of iteration 0 were answered again, and how many answers begin otherwise."""
    by_id = {prompt.id: prompt for prompt in context.prompts.validation}
    rows = [
        row for row in run.answers if row["iteration"] == 0 and row["split"] == "validation" and row["id"] in by_id
    ][:ANSWERS]
    if not rows:
        return 0, 0
    asked = [by_id[row["id"]].asked for row in rows]
    tokens = context.settings.max_new_tokens
    with run.edit.at(0).apply(context.chat.model, check=False):
        again = answer_after_thoughts(
            context.chat,
            asked,
            max_new_tokens=tokens,
            thinking=context.thinking,
            settled=context.judge.settled,
            captures=False,
        ).answers
    # an answer may have ended as soon as its label was settled, so the shorter one says how much there is to compare
    pairs = [(row["answer"][:OPENING], answer[:OPENING]) for row, answer in zip(rows, again, strict=True)]
    same = [bool(old) == bool(new) and (old.startswith(new) or new.startswith(old)) for old, new in pairs]
    return len(rows), same.count(False)
