"""How long is it from the command to the first step of the demonstration, and where does it go?

    python experiments/08_start_up/run.py               # two starts, a minute or two

``jqlora train configs/run/demo.yaml`` is started with an empty cache of codes and programs, and
again with what that left, and interrupted after its first step. The phases are timed by the lines
that the command says, seen from outside; "imports" ends with the first of them. The model as it was
before training is measured after that step. The step is compiled while the base is loaded; what is
left of that is in the last phase. Prediction: the second start saves the compilation,
which is most of it. The aim is 20 seconds. One line goes to ``results.jsonl``, and ``phases.png``
shows the last one.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from jqlora.run.record import record

HERE = Path(__file__).parent
PHASES = (  # the first line of each that begins so; the phase before it ends there
    ("imports, data, headers", ""),
    ("loading the base", "loading"),
    ("compiling and first step", "compiling"),
)
AIM = 20


def start(cache: Path, place: Path) -> dict[str, float]:
    """Seconds of each phase, and ``first step`` from the command on."""
    words = ["train", "configs/run/demo.yaml", f"model.cache={cache}", f"output.directory={place}"]
    begin = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "jqlora.cli", *words],
        stderr=subprocess.PIPE,
        text=True,
        cwd=HERE.parent.parent,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"},
    )
    assert process.stderr is not None
    said, lines, stepped = [(PHASES[0][0], 0.0)], [], None
    for line in process.stderr:
        lines.append(line)
        now = time.perf_counter() - begin
        name, word = PHASES[min(len(said), len(PHASES) - 1)]
        if len(said) < len(PHASES) and line.startswith(word):
            said.append((name, now))
        if line.startswith("step 1/"):
            stepped = now
            process.send_signal(signal.SIGINT)
            process.send_signal(signal.SIGINT)
            break
    process.stderr.close()
    process.kill()
    process.wait()
    if stepped is None:
        raise SystemExit("".join(lines))
    ends = [when for _, when in said[1:]] + [stepped]
    phases = {name: end - when for (name, when), end in zip(said, ends, strict=True)}
    return phases | {"first step": stepped}


def draw(found: dict[str, dict[str, float]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 2.4), layout="constrained")
    names = [name for name, _ in PHASES]
    for name, color in zip(names, ("#9aa5b1", "#4477aa", "#ee6677"), strict=True):
        widths = [phases.get(name, 0.0) for phases in found.values()]
        before = names[: names.index(name)]
        lefts = [sum(phases.get(n, 0.0) for n in before) for phases in found.values()]
        axes.barh(list(found), widths, left=lefts, label=name, color=color)
    axes.axvline(AIM, color="black", linestyle=":", linewidth=1)
    axes.set_xlabel("seconds from the command (dotted: the aim)")
    axes.invert_yaxis()
    axes.legend(ncols=2, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    figure.savefig(HERE / "phases.png", dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=1, help="pairs of starts; the last is kept")
    arguments = parser.parse_args()
    found: dict[str, dict[str, float]] = {}
    for _ in range(arguments.rounds):
        with tempfile.TemporaryDirectory() as place:
            for which in ("first start", "second start"):
                found[which] = start(Path(place) / "cache", Path(place) / which.split()[0])
                shown = {name: round(seconds, 1) for name, seconds in found[which].items()}
                print(which, shown, flush=True)
    record(HERE / "results.jsonl", found)
    draw(found)


if __name__ == "__main__":
    main()
