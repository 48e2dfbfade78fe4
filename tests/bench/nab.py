"""`python -m tests.bench.nab [MODEL ...]`: the standard-profile score of the Numenta Anomaly Benchmark, by category.

A detection is the opening of an incident, published by the detector that the service runs. The threshold knows no
label: the same rules (nab.yaml) and settings for all files, and of each file a model sees the probationary period (15 %
of the rows, 750 at most) before the first row that is scored. A MODEL is `neighbours`, a baseline, or a checkpoint;
without any, `neighbours`, the bundled deepant and the baselines.

The published rows are those of the same files; NAB chooses their thresholds by the labels. The data is that under
TOCSIN_TEST_DATA/nab: folders data/ and labels/, as in numenta/NAB, plain or .gz.

The same figure of one model, with all others beside it:
    TOCSIN_POT__MIN_SCORES=150 tocsin evaluate nab/data/*/*.csv.gz --model neighbours --rules tests/bench/nab.yaml
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

from stream import registry
from stream.detector import Served
from stream.evaluation import baselines, data, nab
from stream.evaluation.baselines import BASELINES, MAKERS
from stream.evaluation.data import Series
from stream.evaluation.runs import detections, run
from stream.service import load_checkpoint, load_rules, use_one_thread
from stream.settings import Settings, load_settings

RULES = Path(__file__).with_name("nab.yaml")
MIN_SCORES = 150  # the probationary period of the shortest files has 243 rows
PUBLISHED = {"ARTime": 77.0, "CAD OSE": 68.2, "Numenta HTM": 66.2, "Random Cut Forest": 51.2, "windowed Gaussian": 37.1}
Makes = Callable[[Series], Served]


def settings_of(rules: Path = RULES, min_scores: int = MIN_SCORES) -> Settings:
    """Settings as a user would make them."""
    return load_settings({"TOCSIN_RULES": str(rules), "TOCSIN_POT__MIN_SCORES": str(min_scores)})


def maker(name: str, settings: Settings) -> Makes:
    """What makes the model of a file."""
    if name in {**MAKERS, **BASELINES}:
        return lambda series: baselines.served(name, series.learned())
    general = registry.served(load_checkpoint(settings, name), settings.pot.config())
    return lambda _: general


def score(series: Series, served: Served, settings: Settings) -> nab.FileScore:
    """Score the incidents of one file."""
    assert series.windows is not None
    made = run(series, served, settings.detector(), load_rules(settings).rules)
    return nab.score_file(detections(series, made.events), len(series.time_ms), series.windows)


def corpus(root: Path) -> list[Series]:
    """Every file that has labels."""
    files = sorted(one for one in (root / "data").rglob("*.csv*") if nab.Labels.beside(one) is not None)
    return [one for file in files for one in data.read(file, fraction=0.5, entity=False, as_nab=True)]


def row(scores: Iterable[tuple[Series, nab.FileScore]]) -> tuple[float, dict[str, float], int, int, int]:
    """The score of all, of each category, windows caught and all, and false detections."""
    scores = list(scores)
    by = defaultdict(list)
    for series, one in scores:
        by[series.category].append(one)
    files = [one for _, one in scores]
    counts = (sum(one.caught for one in files), sum(one.windows for one in files), sum(one.false for one in files))
    return nab.normalised(files), {category: nab.normalised(some) for category, some in by.items()}, *counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", default=["neighbours", "deepant", *BASELINES])
    parser.add_argument("--rules", type=Path, default=RULES)
    parser.add_argument("--min-scores", type=int, default=MIN_SCORES)
    parser.add_argument("--files", action="store_true", help="a line for each file, too")
    given = parser.parse_args()
    root = os.environ.get("TOCSIN_TEST_DATA")
    if not root:
        sys.exit("TOCSIN_TEST_DATA is not set: it names a directory with the data")
    use_one_thread()
    settings = settings_of(given.rules, given.min_scores)
    series = corpus(Path(root) / "nab")
    categories = list(dict.fromkeys(one.category for one in series if one.windows is not None and len(one.windows)))
    heads = [one.removeprefix("real").replace("artificialWithAnomaly", "artificial") for one in categories]
    say(f"{'':18}    all  caught  false  " + "  ".join(f"{one:>13}" for one in heads))
    for name in given.models:
        began, makes, scores = time.monotonic(), maker(name, settings), []
        for one in series:
            scores.append((one, score(one, makes(one), settings)))
            if given.files:
                found = scores[-1][1]
                parts = f"{found.caught} of {found.windows}, {found.false} false: {found.raw:.3f}"
                say(f"  {one.category}/{one.name}: {parts}")
        total, by, caught, windows, false = row(scores)
        cells = "  ".join(f"{by[one]:13.1f}" for one in categories)
        say(f"{name:18} {total:6.1f}  {caught:3}/{windows}  {false:5}  {cells}   {time.monotonic() - began:.0f} s")
    for name, published in PUBLISHED.items():
        say(f"{name:18} {published:6.1f}  published")


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
