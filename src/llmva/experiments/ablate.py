"""Ablations: change the vectors, the iterations or the choice of sublayers (the paper's RQ3, Figures 6 to 8).

Each variant changes one step of a whole run; everything else stays the same, including the seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmva.alignment import Result, RunOptions, align
from llmva.edit import Edit, check_untouched
from llmva.errors import UsageError
from llmva.experiments.cells import Cells, study_identity
from llmva.experiments.measure import ExperimentSetup
from llmva.experiments.summary import method_rates
from llmva.files import write_json
from llmva.judges.base import Judge
from llmva.method.context import VectorHook
from llmva.method.identify import Vectors
from llmva.method.observe import Observation
from llmva.method.svm import angles, spread, unit
from llmva.metrics.rates import point_rates
from llmva.models.at_rest import at_rest
from llmva.models.chat_model import ChatModel
from llmva.models.fingerprint import fingerprint
from llmva.models.sublayers import Decoder
from llmva.progress import Progress
from llmva.prompts.prompt_set import PromptSet
from llmva.runs.environment import versions
from llmva.runs.limits import Tally, limits_of
from llmva.settings import make_settings

KINDS = ("vectors", "iterations", "layers")
ANGLES = (0, 30, 60, 90)
SHARES = (0.125, 0.25, 0.375, 0.5, 0.65625, 0.8125, 1.0)  # of the sublayers
Maker = Callable[[torch.Generator], VectorHook]  # makes a change of the vectors from a generator
Variant = tuple[str, float | None, str, Maker | None, Mapping[str, Any]]  # series, x, label, change, settings


def ablate(
    model: Any,
    tokenizer: Any,
    prompts: PromptSet | None = None,
    *,
    what: str,
    judge: Judge | str = "phrases",
    seeds: Sequence[int] = (42, 43, 44),
    out: str | Path | None = None,
    restart: bool = False,
    name: str | None = None,
    command: str | None = None,
    batch_tokens: int | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Test F1, ASR and ORR of runs with one step changed; returns the content of ablate.json.

    Args:
        what: "vectors" turns both vectors of every sublayer by 30, 60 and 90 degrees in random directions, and fits
            them by other means: difference of means, logistic regression, LinearSVC. "layers" varies how many
            sublayers are edited, by score and at random. "iterations" measures every iteration of runs that do not
            stop early.
        seeds: of the draws; one run of each variant for each.
    """
    from llmva.judges import make_judge

    if what not in KINDS:
        raise UsageError(f"There is no ablation '{what}': choose {', '.join(KINDS)}.")
    judge = make_judge(judge) if isinstance(judge, str) else judge
    prompts = prompts or PromptSet.bundled()
    progress = progress or Progress()
    chosen = make_settings(**settings)
    chat = ChatModel.of(model, tokenizer, batch_tokens, system=chosen.system)
    base = fingerprint(chat.decoder, name or getattr(model.config, "_name_or_path", "") or "unnamed")
    identity = {
        **study_identity(chat, base, prompts, ()),
        "what": what,
        "judge": judge.name,
        "settings": chosen.model_dump(),
    }
    directory = None if out is None else Path(out)
    check_untouched(chat.model)
    with at_rest(chat.model), closing(Cells(directory, identity, restart=restart)) as cells:
        for sentence in cells.notes:
            progress.note(sentence)
        setup = ExperimentSetup.of(chat, prompts, judge, chosen, (), progress)

        def run(variant: Variant, seed: int) -> Result:
            _, _, _, make, changed = variant
            return align(
                model,
                tokenizer,
                prompts,
                judge=judge,
                seed=seed,
                batch_tokens=chat.batching.tokens,
                progress=progress,
                options=RunOptions(
                    vector_hook=make(torch.Generator().manual_seed(seed)) if make else None,
                    thinking=setup.thinking,
                    measure_test=False,
                ),
                **{**chosen.model_dump(), **changed},
            )

        def measured(edit: Edit, label: str) -> dict[str, Any]:
            with edit.apply(model, check=False):
                seen = setup.observe(prompts.test, f"{label}: test prompts")
            labels = [label.value for label in seen.labels]
            return {**point_rates(seen.prompts, seen.labels), "labels": labels, **Tally.of_seen(seen).counts()}

        untouched = cells.get("untouched", lambda: measured(Edit({}, base), "untouched model"))
        tallied = [untouched]
        series: dict[str, list[dict[str, Any]]] = {}
        variants = _variants(what, chat.decoder)
        for number, variant in enumerate(variants):
            label = f"{variant[0]}, {variant[2]}"
            by_seed: list[list[dict[str, Any]]] = []  # by seed, by iteration (one entry but for "iterations")
            for seed in seeds:

                def cell(variant: Variant = variant, seed: int = seed, label: str = label) -> dict[str, Any]:
                    progress.note(f"{label}, seed {seed}")
                    result = run(variant, seed)
                    best = result.record["best_iteration"]
                    last = len(result.record["iterations"]) - 1
                    steps_ = range(1, last + 1) if what == "iterations" else [best]
                    rows = []
                    for t in steps_:
                        edit = result.every.at(t) if t else Edit({}, base)
                        entry = measured(edit, f"{label}, iteration {t}") if t else dict(untouched)
                        rows.append({**entry, "iteration": t, "seed": seed, "stopped": result.record["stopped"]})
                    return {"rows": rows}

                by_seed.append(cells.get(f"{number:02d}-{seed}", cell)["rows"])
            tallied += [row for rows in by_seed for row in rows if row["iteration"]]
            points = series.setdefault(variant[0], [])
            if what != "iterations":
                points.append(_point(variant[1], variant[2], [rows[0] for rows in by_seed], prompts))
                continue
            for t in range(1, max(len(rows) for rows in by_seed) + 1):
                # a run that could go no further stays where it ended
                points.append(_point(t, str(t), [rows[min(t, len(rows)) - 1] for rows in by_seed if rows], prompts))

    version = versions()
    record = {
        "format": 1,
        "kind": "ablation",
        "what": what,
        "llmva": version.pop("llmva"),
        "versions": version,
        "command": command,
        "base": {key: value for key, value in base.items() if key not in ("hashes", "weights")},
        "judge": judge.name,
        "seeds": list(seeds),
        "settings": chosen.model_dump(),
        "untouched": {key: untouched[key] for key in ("f1", "asr", "orr", "garbled")},
        "x_label": {"vectors": "degrees", "iterations": "iteration", "layers": "sublayers"}[what],
        "series": [{"name": title, "points": points} for title, points in series.items()],
        "limits": [*limits_of(chat, prompts.warnings, setup.thinking, Tally.of_cells(tallied)), *cells.sentences],
    }
    if directory is not None:
        write_json(directory / "ablate.json", record)
    return record


def _point(x: float | None, label: str, rows: Sequence[Mapping[str, Any]], prompts: PromptSet) -> dict[str, Any]:
    rates = method_rates(rows, prompts.test)
    runs = [{k: v for k, v in row.items() if k != "labels"} for row in rows]
    return {"x": x, "label": label, **{k: rates[k] for k in ("f1", "asr", "orr", "garbled")}, "runs": runs}


def _variants(what: str, decoder: Decoder) -> list[Variant]:
    if what == "iterations":
        return [("LLM-VA", None, "every iteration", None, {"patience": 0, "min_kept": 0.0, "passes": 1})]
    if what == "layers":
        total = len(decoder.sublayers)
        counts = sorted({max(1, round(share * total)) for share in SHARES})
        best: list[Variant] = [("best scored", n, str(n), None, {"layers": n}) for n in counts]
        return best + [("at random", n, str(n), random_scores, {"layers": n}) for n in counts[:-1]]
    turned: list[Variant] = [("turned at random", a, f"{a}°", turned_by(float(a)), {}) for a in ANGLES]
    return [
        *turned,
        ("fitted otherwise", None, "difference of means", refitted(mean_difference), {}),
        ("fitted otherwise", None, "logistic regression", refitted(logistic_normal), {}),
        ("fitted otherwise", None, "LinearSVC", None, {"svm": "sklearn"}),
        ("fitted otherwise", None, "exact SVM, no harmless metric", None, {"harmless_weight": 0.0}),
    ]


def random_scores(generator: torch.Generator) -> VectorHook:
    """Choose sublayers at random, again in every iteration."""

    def hook(vectors: Vectors, train: Observation, t: int) -> Vectors:
        return replace(vectors, scores=torch.rand(len(vectors.scores), generator=generator, dtype=torch.float64))

    return hook


def turned_by(degrees: float) -> Maker:
    """Turn both vectors of every sublayer towards random orthogonal directions (the paper's Figure 6).

    The choice of sublayers stays that of the original vectors.
    """

    def maker(generator: torch.Generator) -> VectorHook:
        def hook(vectors: Vectors, train: Observation, t: int) -> Vectors:
            return _along(vectors, turn(vectors.directions, degrees, generator), train)

        return hook

    return maker


def refitted(fit: Callable[[Tensor, Tensor], Tensor]) -> Maker:
    """Fit both vectors by `fit`, from outputs [n, d] and labels [n]; the choice of sublayers stays that of the SVMs."""

    def maker(generator: torch.Generator) -> VectorHook:
        def hook(vectors: Vectors, train: Observation, t: int) -> Vectors:
            directions = [torch.stack([fit(o.double(), signs) for signs in train.signs]) for o in train.capture.outputs]
            return _along(vectors, torch.stack(directions), train)

        return hook

    return maker


def _along(vectors: Vectors, directions: Tensor, train: Observation) -> Vectors:
    """Other directions [S, 2, d], with their own spreads and angles. Sublayers with zero vectors keep them."""
    directions = torch.where(vectors.directions.any(-1, keepdim=True), directions, 0.0)
    outputs = train.capture.outputs
    sigma = torch.cat([spread(o[None].double(), v[None]) for o, v in zip(outputs, directions, strict=True)])
    return replace(vectors, directions=directions, spread=sigma, angles=angles(*directions.unbind(1)))


def turn(vectors: Tensor, degrees: float, generator: torch.Generator) -> Tensor:
    """Unit vectors [..., d] turned by `degrees` in random directions."""
    away = torch.randn(vectors.shape, generator=generator, dtype=torch.float64).to(vectors)
    away = unit(away - (away * vectors).sum(-1, keepdim=True) * vectors)
    angle = torch.deg2rad(torch.tensor(degrees, dtype=vectors.dtype))
    return torch.cos(angle) * vectors + torch.sin(angle) * away


def mean_difference(features: Tensor, signs: Tensor) -> Tensor:
    """Unit difference of the class means of features [n, d]."""
    return unit(features[signs > 0].mean(0) - features[signs < 0].mean(0))


def logistic_normal(features: Tensor, signs: Tensor) -> Tensor:
    """Unit normal of scikit-learn's logistic regression without intercept, the features scaled to unit mean square."""
    from sklearn.linear_model import LogisticRegression

    scale = features.pow(2).mean().sqrt().clamp_min(1e-30)
    fitted = LogisticRegression(C=1.0, fit_intercept=False, max_iter=2000).fit(
        (features / scale).cpu().numpy(), signs.cpu().numpy()
    )
    return unit(torch.from_numpy(fitted.coef_[0]).to(features))
