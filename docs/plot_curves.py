"""Draws held-out bits per byte of runs against member-tokens: python docs/plot_curves.py OUT.png RUN=LABEL ...

RUN is a run directory. Dashed lines are the baselines of the first run. Needs matplotlib (the extra `dev`).
"""

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt

NAMED = {"unigram": "unigram", "bigram": "bigram", "trigram": "trigram", "gzip": "gzip"}


def main(out: str, *runs: str) -> None:
    """Write the picture `out` of `runs`, each a directory and a label joined by `=`."""
    figure, axes = plt.subplots(figsize=(8, 4.5), dpi=110)
    for run in runs:
        directory, _, label = run.partition("=")
        config = json.loads(Path(directory, "config.json").read_text())["eggroll"]
        lines = map(json.loads, Path(directory, "metrics.jsonl").read_text().splitlines())
        points = [
            (line["step"] * config["population"] * config["segment"] / 1e6, line["held_out_bits_per_byte"])
            for line in lines
            if "held_out_bits_per_byte" in line
        ]
        axes.plot(*zip(*points, strict=True), label=label or directory)
    figures = json.loads(Path(runs[0].partition("=")[0], "baselines.json").read_text())
    for name, label in NAMED.items():
        axes.axhline(figures[name], color="grey", linewidth=0.8, linestyle="--")
        axes.annotate(
            label, (1, figures[name]), (4, 0), ("axes fraction", "data"), "offset points",
            fontsize=8, color="grey", va="center",
        )  # fmt: skip
    axes.set_xlabel("member-tokens, millions")
    axes.set_ylabel("bits per byte, held out")
    axes.legend()
    figure.tight_layout()
    figure.savefig(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
