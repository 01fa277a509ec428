"""The page on AnyUp, JAFAR, NAF and FeatUp trained alike: scores over seeds, with intervals, and the commands."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.results import Result, markdown
from tools import fair_runs
from tools.fair_runs import EVALUATIONS, OWN, UNSEEN
from tools.report import Attempt, read_results, smooth

SCORES = ("mIoU", "band_mIoU")
CONFIDENCE = 0.95
Table = Mapping[tuple[str, str], Mapping[int, Mapping[str, float]]]
"""Encoder and method -> seed -> scores."""


def results_of(out: Path, seed: int) -> list[Result]:
    """Return the results of the complete evaluations of a seed; AnyUp with the weights that ship is "shipped"."""
    complete = [evaluation for evaluation in EVALUATIONS if fair_runs.scored(out, evaluation, seed)]
    found = [(name, result) for name in complete for result in read_results(fair_runs.scores_of(out, name, seed))]
    return [dataclasses.replace(x, method=name) if name == "shipped" else x for name, x in found]


def interval(values: Sequence[float], sign: str = "") -> str:
    """Return the mean and, of several values, half the width of its confidence interval by Student's distribution."""
    from scipy.special import stdtrit

    mean, count = float(np.mean(values)), len(values)
    if count == 1:
        return f"{mean:{sign}.4f}"
    half = stdtrit(count - 1, (1 + CONFIDENCE) / 2) * np.std(values, ddof=1) / count**0.5
    return f"{mean:{sign}.4f} ± {half:.4f}"


def table_of(results: Mapping[int, Sequence[Result]]) -> Table:
    """Return, for encoders and methods, the scores by seed, of the results of each seed."""
    table: dict[tuple[str, str], dict[int, Mapping[str, float]]] = {}
    for seed, found in results.items():
        for result in found:
            table.setdefault((result.encoder, result.method), {})[seed] = result.scores
    return table


def gains_of(table: Table, encoder: str, method: str, score: str) -> list[float]:
    """Return, by seed, a method's score less that of bilinear interpolation with the same seed."""
    plain = table.get((encoder, "bilinear"), {})
    return [scores[score] - plain[seed][score] for seed, scores in table[encoder, method].items() if seed in plain]


def rows_of(table: Table) -> list[list[str]]:
    """Return the rows of the table of scores: by encoder, and in it by method."""
    rows = []
    for encoder, method in sorted(table, key=lambda key: key[0]):
        by_seed = table[encoder, method]
        gains = [gains_of(table, encoder, method, score) if method != "bilinear" else [] for score in SCORES]
        scores = [interval([scores[score] for scores in by_seed.values()]) for score in SCORES]
        seen = encoder not in UNSEEN or method == "bilinear" or (method == "shipped" and encoder == "lite1")
        name = "AnyUp, shipped" if method == "shipped" else method
        row = [encoder if seen else f"{encoder}, unseen", name, str(len(by_seed)), *scores]
        rows.append([*row, *(interval(gain, "+") if gain else "-" for gain in gains)])
    return rows


def claim_of(table: Table) -> list[list[str]]:
    """Return what the agnostic methods gain in the band on each encoder, less bilinear, and which share is kept."""
    rows = []
    for method in ("anyup", "naf"):
        if any((encoder, method) not in table for encoder in ("lite0", *UNSEEN)):
            continue
        gains = {encoder: gains_of(table, encoder, method, "band_mIoU") for encoder in ("lite0", *UNSEEN)}
        own, other = np.mean(gains["lite0"]), np.mean([gains[encoder] for encoder in UNSEEN])
        share = f"{other / own:.2f}" if own > 0 else "-"
        rows.append([method, *(interval(gain, "+") for gain in gains.values()), share])
    return rows


def page(out: Path, seeds: Sequence[int]) -> str:
    """Return the page on all that is complete. Raises FileNotFoundError if nothing is."""
    results = {seed: found for seed in seeds if (found := results_of(out, seed))}
    complete = [(method, seed) for method in OWN for seed in seeds if fair_runs.trained(out, method, seed)]
    if not (results and complete):
        raise FileNotFoundError(f"{out} holds no complete run and evaluation; python -m tools.fair_table evaluate")
    runs = [(method, seed, Attempt.read(fair_runs.run_of(out, method, seed))) for method, seed in complete]
    table, recipe, settings = table_of(results), runs[0][2].settings, next(iter(results.values()))[0].settings
    return "\n".join([*introduction(recipe), *scores(table, settings), *training(runs), *commands(seeds[0]), ""])


def introduction(recipe: Mapping[str, Any]) -> list[str]:
    """Return what all runs have in common, given the settings of one, and what each method has of its own."""
    rate, steps, photographs = recipe["optimizer"]["learning_rate"], recipe["max_steps"], recipe["batch_size"]
    size, clip = " x ".join(map(str, recipe["dataset"]["guidance_size"])), recipe["optimizer"]["clip_norm"]
    return [
        "# AnyUp, JAFAR, NAF and FeatUp trained alike",
        "",
        "`python -m tools.fair_table report` wrote this page; every score is read from the folders of the runs.",
        "",
        f"All four learned the features of EfficientNet-Lite0 with stride 32 and of no other encoder: {steps} steps of "
        f"{photographs} photographs, the same photographs, regions, mirroring and optimiser (AdamW, a cosine from "
        f"{rate} on, the gradient's norm clipped to {clip:g}), guidance of {size}, and the targets and terms of each "
        "method's own recipe without any further one: AnyUp without the outlines and the shuffled channels that the "
        "shipped weights learned with.",
        "",
        markdown(["method", "the encoder sees, as input; as targets"], list(fair_runs.VIEWS.items())),
        "NAF's published kernel of 9 x 9 cells does not fit into 7 x 7 cells: it has one of 7 x 7 in training, and the "
        "same in evaluation, where there are 14 x 14. FeatUp is trained on photographs of 224 x 224, as published. Its "
        "features pass a LayerNorm, so that its probes learn from values of another scale.",
        "",
    ]


def scores(table: Table, settings: Mapping[str, Any]) -> list[str]:
    """Return the table of scores, and that of the encoders that were never seen; `settings` are of one result."""
    size, probe = " x ".join(map(str, settings["dataset"]["size"])), settings["probe"]
    lines = [
        "## Scores",
        "",
        f"Linear probes for segmentation of the cut-outs at {size}, {probe['epochs']} epochs, trained on one pixel of "
        f"every {probe['pixel_stride']} x {probe['pixel_stride']} and scored on all. *band*: pixels within 4 of an "
        "edge. A seed is that of the training run and of the probe on its features; ± is half of the "
        f"{CONFIDENCE:.0%} interval of the mean over seeds (Student's). *less bilinear*: seed by seed, a method and "
        "bilinear interpolation having the same probe's seed. The [shipped AnyUp](results.md) is one set of weights, "
        "which three chained runs on Lite0 and Lite1 made: its seeds are those of the probe alone.",
        "",
        markdown(
            ["encoder", "method", "seeds", "mIoU", "band mIoU", "mIoU less bilinear", "band less bilinear"],
            rows_of(table),
        ),
    ]
    if claim := claim_of(table):
        lines += [
            "## Encoders that were never seen",
            "",
            "What is gained in the band, less bilinear, where the encoder was learned and where it was not; *kept*: "
            "the mean of the unseen ones over that of Lite0. JAFAR and FeatUp have no entry: their weights fit the "
            "width of one encoder.",
            "",
            markdown(["method", "lite0", *(f"{name}, unseen" for name in UNSEEN), "kept"], claim),
        ]
    return lines


def training(runs: Sequence[tuple[str, int, Attempt]]) -> list[str]:
    """Return the table of the training runs, each with its method and seed."""
    return [
        "## Training",
        "",
        markdown(
            ["method", "seed", "steps", "objective at the end"],
            [[method, seed, run.steps, f"{smooth(run.metrics)[-1]:.4f}"] for method, seed, run in runs],
        ),
        "Objectives of different methods do not compare.",
        "",
    ]


def commands(seed: int) -> list[str]:
    """Return the commands, those of the runs with one seed."""
    return [
        "## Commands",
        "",
        "DATA holds `photos/train` and `cutouts`, OUT all runs. A command that was stopped goes on if given again.",
        "",
        "```sh",
        "python -m tools.fair_table train DATA OUT",
        "python -m tools.fair_table evaluate DATA OUT",
        "python -m tools.fair_table report DATA OUT --page docs/fair_table.md",
        "```",
        "",
        f"They do what these do, of which every seed has its own; this is {seed}:",
        "",
        "```sh",
        *("python -m " + shlex.join(run) for run in fair_runs.of_seed(Path("DATA"), Path("OUT"), seed)),
        "```",
    ]
