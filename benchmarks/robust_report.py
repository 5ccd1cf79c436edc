"""What came of `robust.py`, from its records alone: a table in Markdown for each data set, and curves."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from benchmarks.case import is_ours
from benchmarks.plot import OTHERS, OURS, certificate
from benchmarks.record import Record
from mimir_fast.reproduction.faster import Estimate
from mimir_fast.reproduction.tables import markdown

Seeds = dict[int, Record]
SPEED, CASE, PLAIN = "robust_step", "robust", "plain"
BEST = "best pgd20"
SAME = "mimir_fast pgd"
"""Ours that computes what the plain loop does."""


def of_data(cases: Sequence[Sequence[Record]], case: str) -> dict[str, dict[str, Seeds]]:
    """Data set → training → seed → its record; where no seed belongs to it, 0."""
    found: dict[str, dict[str, Seeds]] = {}
    for record in (r for records in cases for r in records if r.case == case and r.status == "ok" and r.params):
        found.setdefault(record.params["data"], {}).setdefault(record.impl, {})[record.params.get("seed", 0)] = record
    return found


def tables(cases: Sequence[Sequence[Record]]) -> str:
    """Of each data set the times of a step, and what each training took to the target."""
    parts = [steps_table(impls) for impls in of_data(cases, SPEED).values()]
    return "\n".join([*parts, *(table(impls) for impls in of_data(cases, CASE).values())])


def steps_table(impls: dict[str, Seeds]) -> str:
    """Where the time of a step goes."""
    first = next(iter(impls.values()))[0].params
    rows = [[f"a step, {first['data']}", "ms of the processor", "of it the attack", "ms on the clock"]]
    for name, seeds in impls.items():
        record = seeds[0]
        whole, none = record.extra["cpu_ms"], record.extra["cpu_ms without attack"]
        wall = "disturbed" if record.disturbed else f"{record.ms['median']:.1f}"
        rows.append([name, f"{whole:.1f}", f"{1 - none / whole:.0%}", wall])
    return markdown(rows)


def table(impls: dict[str, Seeds]) -> str:
    """A row a training: mean over seeds and 95 % interval; times are of the seeds that reached the target."""
    plain = impls[PLAIN]
    params = next(iter(plain.values())).params
    rows = [
        [
            f"{params['data']}, {params['attack']}", "processor seconds to the target", "times as fast",
            "times as fast on the clock", "best PGD-20, %", "− plain loop", "reached",
        ]
    ]  # fmt: skip
    for name, seeds in impls.items():
        pairs = [(plain[seed], seeds[seed]) for seed in sorted(seeds.keys() & plain.keys())]
        reached = [value for _, own in pairs if (value := seconds(own, "cpu_s")) is not None]
        gaps = [100 * (own.extra[BEST] - other.extra[BEST]) for other, own in pairs]
        others = ["", "", ""]
        if name != PLAIN:
            others = [*(ratio([faster(*pair, clock) for pair in pairs]) for clock in ("cpu_s", "wall_s")),
                      Estimate(tuple(gaps)).text("+")]  # fmt: skip
        rows.append(
            [
                name, f"{mean(reached):.1f}" if reached else "", *others[:2],
                Estimate(tuple(100 * own.extra[BEST] for _, own in pairs)).text(), others[2],
                f"{len(reached)} of {len(pairs)}",
            ]
        )  # fmt: skip
    return markdown(rows)


def seconds(record: Record, clock: str) -> float | None:
    """To the target; None where it was not reached."""
    return record.extra.get(f"{clock} to target")


def faster(plain: Record, other: Record, clock: str) -> float | None:
    """Seconds of the plain loop over those of another; None where one was not reached, or the clock was disturbed."""
    one, two = seconds(plain, clock), seconds(other, clock)
    if one is None or two is None or (clock == "wall_s" and (plain.disturbed or other.disturbed)):
        return None
    return one / two


def ratio(found: Sequence[float | None]) -> str:
    """Mean and interval of those that there are; empty where there is none."""
    values = [value for value in found if value is not None]
    if not values:
        return ""
    middle, reach = mean(values), Estimate(tuple(values)).reach
    return f"{middle:.2f} ×" + ("" if reach is None else f" ({max(middle - reach, 0):.2f} to {middle + reach:.2f})")


def draw(cases: Sequence[Sequence[Record]], path: Path) -> None:
    """Print the tables, and draw a panel a data set: PGD-20 accuracy over processor seconds, means of the seeds."""
    print(tables(cases))
    panels = of_data(cases, CASE)
    if not panels:
        return
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * len(panels) + 2.0, 4.2), dpi=160, layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    names = list(dict.fromkeys(name for impls in panels.values() for name in impls))
    others = iter(colormaps["Set2"].colors)  # type: ignore[attr-defined]
    colours = {n: OURS if n == SAME else next(others) if is_ours(n) else OTHERS for n in names}
    for axis, (data, impls) in zip(axes, panels.items(), strict=True):
        for name, seeds in impls.items():
            points = list(zip(*(record.curve for record in seeds.values()), strict=True))
            xs = [0.0, *(mean(p["cpu_s"] for p in point) for point in points)]
            ys = [float("nan"), *(100 * mean(p["pgd20"] for p in point) for point in points)]
            style = "-" if name in (PLAIN, SAME) else "--"
            axis.plot(xs, ys, style, marker="o", ms=3, lw=1.6, color=colours[name], label=name)
        axis.axhline(100 * mean(r.extra["target"] for r in impls[PLAIN].values()), color="0.4", lw=1, ls=":")
        axis.set_title(data.replace("_", " "), fontsize=10)
        axis.set_xlabel("processor seconds of training", fontsize=9)
        axis.grid(color="0.92")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("PGD-20 accuracy of held-out training images, %", fontsize=9)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=8)
    figure.supxlabel(certificate([r for records in cases for r in records]), fontsize=7, color="0.4")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
