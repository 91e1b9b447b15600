"""Draw assets/diagram.png: a path, one transition of it, the distribution there, and the two clips.

    python tests/experiments/diagram.py
"""
from pathlib import Path

import numpy as np
from compare import STYLE
from matplotlib import rcParams
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

ROOT = Path(__file__).resolve().parents[2]
LETTERS = "ACGT"
STATES = ["____", "__T_", "__TC", "A_TC", "AGTC"]      # the path
TRANSITION, POSITION = 2, 0                            # transition 2 draws a token at position 0
WEIGHTS = [0.45, 0.15, 0.3, 0.1]                       # the distribution it is drawn from


def draw_path(axis):
    axis.set_title("a path: states and transitions", fontsize=13)
    axis.set(xlim=(-0.3, 7.5), ylim=(-0.6, len(STATES) - 0.3))
    axis.axis("off")
    for j, state in enumerate(STATES):
        for i, letter in enumerate(state):
            is_scored = (j, i) == (TRANSITION, POSITION)
            box = Rectangle((i, -j + 3.6), 0.9, 0.75, fc="0.85" if letter == "_" else "white",
                                ec="tab:red" if is_scored else "0.3", lw=3 if is_scored else 1)
            axis.add_patch(box)
            axis.text(i + 0.45, -j + 3.97, letter.replace("_", ""), ha="center", va="center",
                      fontsize=14)
        time = "1.0" if j == 0 else f"{0.9 - 0.22 * j:.1f}"
        axis.text(4.2, -j + 3.97, f"t = {time}", va="center", fontsize=11)
    axis.text(5.9, -TRANSITION + 3.97, "a transition:\nstate, position", color="tab:red",
              fontsize=12, va="center")


def draw_distribution(axis):
    axis.set_title("the distribution there  w = softmax(log s)", fontsize=13)
    colours = ["tab:red" if v == 0 else "0.7" for v in range(4)]
    axis.bar(list(LETTERS), WEIGHTS, color=colours)
    axis.set_ylabel("w", fontsize=12)
    axis.tick_params(labelsize=13)
    axis.set_ylim(0, 0.58)
    axis.text(0.1, 0.52, r"$\sum_v w_v\,\nabla\log s_v = -\nabla\log w_A$", fontsize=14)


def draw_clips(axis, clip=0.2):
    axis.set_title("weight of the gradient, A > 0", fontsize=13)
    r = np.linspace(0.4, 1.8, 400)
    axis.plot(r, np.where(r > 1 + clip, 0, r), label="stop (PPO)", lw=2.5)
    axis.plot(r, np.minimum(r, 1 + clip), "--", label="cap (SEPO)", lw=2.5)
    axis.axvline(1 + clip, color="0.7", lw=1)
    axis.set_xlabel(r"ratio  $w_A^{new} / w_A^{old}$", fontsize=12)
    axis.legend(loc="lower left")


def main():
    rcParams.update(STYLE)
    figure = Figure(figsize=(11, 3.4))
    axes = figure.subplots(1, 3, width_ratios=[1.1, 1, 1])
    for axis, draw in zip(axes, (draw_path, draw_distribution, draw_clips)):
        draw(axis)
    figure.savefig(ROOT / "assets" / "diagram.png")


if __name__ == "__main__":
    main()
