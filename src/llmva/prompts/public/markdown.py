"""The tables of docs/datasets.md: `python -m llmva.prompts.public.markdown` prints them."""

from __future__ import annotations

from llmva.prompts.public.registry import Part, entries


def markdown_table() -> str:
    """What the registry holds, as three tables in Markdown."""
    lines = [
        "| name | sides | prompts | licence | login | home | paper |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for entry in entries().values():
        rows = "unknown" if entry.rows is None else f"{entry.rows:,}"
        home = f"[{entry.home.id}]({entry.home.url})" if entry.home.url else "this package"
        paper = f"[{entry.arxiv}](https://arxiv.org/abs/{entry.arxiv})" if entry.arxiv else "none"
        licence = f"{entry.licence}; {entry.licence_note}" if entry.licence_note else entry.licence
        login = "yes" if entry.home.gated else "no"
        sides = " and ".join(entry.sides)
        lines.append(f"| `{entry.name}` | {sides} | {rows} | {licence} | {login} | {home} | {paper} |")
    lines += ["", "| name | what it holds | revision | not checked |", "| --- | --- | --- | --- |"]
    for entry in entries().values():
        pinned = f"`{entry.home.revision}`" if entry.home.revision else "not pinned"
        if entry.home.kind == "bundled":
            pinned = "that of the package"
        unchecked = "; ".join(entry.unchecked) or "nothing"
        lines.append(f"| `{entry.name}` | {entry.description} | {pinned} | {unchecked} |")
    lines += ["", "| name | prompts from | configuration, split or file | which rows are toxic, which benign |"]
    lines.append("| --- | --- | --- | --- |")
    for entry in entries().values():
        for part in entry.parts:
            where = part.files[0] if entry.home.kind == "github" else ", ".join(filter(None, (part.config, part.split)))
            where = "prompts.jsonl" if entry.home.kind == "bundled" else where
            columns = ", else ".join(f"`{column}`" for column in part.columns)
            lines.append(f"| `{entry.name}` | {columns} | {where} | {_rule(part)} |")
        for part in entry.copies:
            columns = ", else ".join(f"`{column}`" for column in part.columns)
            lines.append(f"| `{entry.name}` | {columns} | a copy called {part.files[0]} | {_rule(part)} |")
    return "\n".join(lines) + "\n"


def _rule(part: Part) -> str:
    if part.label:
        values = {"toxic": part.label.toxic, "benign": part.label.benign}
        rule = "; ".join(f"`{part.label.column}` {' or '.join(cells)}: {side}" for side, cells in values.items())
    else:
        rule = f"all {part.side}"
    return f"{rule}; only `{part.only.column}` {' or '.join(part.only.values)}" if part.only else rule


if __name__ == "__main__":
    print(markdown_table(), end="")
