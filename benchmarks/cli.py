"""The command line of the benchmarks."""

import argparse
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from benchmarks import authors, compare, plot, record, table
from benchmarks import ceilings as machine
from benchmarks.case import Size, is_ours
from benchmarks.device_suite import PARTS, run_suite
from benchmarks.disturbance import MOST, words
from benchmarks.questions import QUESTIONS, module_of
from benchmarks.runner import run_question
from mimir_fast.allocator import keep_large_buffers


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments of the command line, checked."""
    parser = argparse.ArgumentParser("python -m benchmarks", description="Which is faster, how much, and is it right?")
    add, size = parser.add_argument, parser.add_mutually_exclusive_group()
    add("questions", nargs="*", metavar="QUESTION", help=f"some of {', '.join(QUESTIONS)}")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    size.add_argument("--full", dest="size", action="store_const", const="full", help="the sizes of the promises; long")
    size.add_argument("--tiny", dest="size", action="store_const", const="tiny", help="does it run; times mean nothing")
    parser.set_defaults(size="quick")
    add("--only", metavar="CASE", help="cases of this name or parameter: hsic_fwd_bwd, image=32")
    add("--box", type=float, help="seconds of timing a case, instead of the question's own")
    add("--compare", type=Path, metavar="OLD.jsonl", help="exit with 1 on a regression beyond the noise")
    add("--output", type=Path, metavar="NEW.jsonl", help="append the records; default runs/benchmarks/…")
    add("--plot", type=Path, metavar="FILE.png", help="where the picture goes; default beside the records")
    add("--draw", type=Path, metavar="OLD.jsonl", help="only draw --plot from records of earlier runs")
    add("--official", type=Path, metavar="PATH", help="the MIMIR authors' code, a checkout, to be timed beside ours")
    add(
        "--device-suite",
        action="store_true",
        help="tests and gates, then all timings, within --budget; goes on where --output ends",
    )
    add("--part", choices=PARTS, help="only this part of the device suite, 200 s at the most")
    add("--budget", type=float, default=600, help="seconds of the device suite")
    options = parser.parse_args(arguments)
    if options.part and not options.device_suite:
        parser.error("--part names a part of --device-suite")
    unknown = [name for name in options.questions if name not in QUESTIONS]
    if unknown:
        parser.error(f"unknown question {', '.join(unknown)}: wanted some of {', '.join(QUESTIONS)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this machine has no CUDA GPU that torch sees; --device cpu works everywhere")
    if options.official:
        os.environ[authors.VARIABLE] = str(options.official.resolve())
        if reason := authors.why_not():
            parser.error(f"--official: {reason}")
    for name in ("compare", "draw"):
        path = getattr(options, name)
        if path and not path.is_file():
            parser.error(f"--{name} {path}: there is no such file; write one with --output first")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run and report; the exit status is 1 when something of ours is wrong or became slower."""
    options = parse(arguments)
    alone = module_of(options.questions[0]) if len(options.questions) == 1 else None
    draw = getattr(alone, "draw", plot.draw)
    if options.draw:
        draw(record.by_case(record.read(options.draw)), options.plot or options.draw.with_suffix(".png"))
        return 0
    cuda = options.device == "cuda" or (options.device == "auto" and torch.cuda.is_available())
    device = torch.device("cuda" if cuda else "cpu")
    output = options.output or Path(f"runs/benchmarks/{device.type}-{options.size}.jsonl")
    if options.output is None and not options.device_suite:
        output.unlink(missing_ok=True)  # a name of ours is the newest run, a name of yours collects
    if not cuda:
        keep_large_buffers()  # as a training run does; the rivals in this process profit as well
    ceilings = machine.measure(device, tiny=options.size == "tiny")
    print(describe(ceilings, device), flush=True)
    done = []
    for records in run(options, device, ceilings, output):
        table.print_case(records)
        record.append(output, records)
        done.append(records)
    picture = options.plot or output.with_suffix(".png")
    draw(done, picture)
    states = Counter(r.status for case in done for r in case)
    print(f"{dict(states)}   records: {output}   picture: {picture}")
    if disturbed := sum(any(r.disturbed for r in case) for case in done):
        print(f"{disturbed} of {len(done)} cases were disturbed by other work: no ratios of them; repeat them")
    return max(verdict(done), against(options.compare, done) if options.compare else 0)


def run(
    options: argparse.Namespace, device: torch.device, ceilings: machine.Ceilings, output: Path
) -> Iterator[list[record.Record]]:
    """The records of each case that the options ask for."""
    size: Size = "gpu" if device.type == "cuda" and options.size != "tiny" else options.size
    before = record.read(output) if output.is_file() else []
    if options.device_suite:
        parts = [options.part] if options.part else PARTS
        yield from run_suite(device, size, ceilings, options.budget, parts, before)
        return
    default = [name for name, q in QUESTIONS.items() if (options.size == "full" or q.quick) and not q.named_only]
    for question in options.questions or default:
        if own := getattr(module_of(question), "records", None):
            yield from own(device, size, ceilings, only=options.only, before=before)
            continue
        box_s = options.box or QUESTIONS[question].box_s * {"tiny": 0.02, "quick": 1, "full": 3}[options.size]
        yield from run_question(question, device, size, ceilings, box_s=box_s, only=options.only)


def verdict(cases: Sequence[Sequence[record.Record]]) -> int:
    """1 when a provider of ours failed, or what all providers need."""
    bad = [r for case in cases for r in case if r.status == "failed" and (is_ours(r.impl) or not r.baseline)]
    for r in bad:
        print(f"FAILED {r.case} {r.impl} {r.params}: {r.note}", file=sys.stderr)
    return int(bool(bad))


def against(old: Path, cases: Sequence[Sequence[record.Record]]) -> int:
    """Print the comparison; 1 on a regression."""
    try:
        changes = compare.compare(record.read(old), [r for case in cases for r in case])
    except ValueError as error:
        print(f"--compare {old}: {error}", file=sys.stderr)
        return 2
    print("\n".join(map(str, changes)))
    return int(any(change.is_regression for change in changes))


def describe(ceilings: machine.Ceilings, device: torch.device) -> str:
    """The machine in one line."""
    where = record.environment_once()
    name = where["gpu"] if device.type == "cuda" else f"{where['cpu']}, {torch.get_num_threads()} threads"
    rates = ", ".join(f"{p} {rate:.3g} TFLOP/s" for p, rate in ceilings.tflops.items())
    noted = words(ceilings.disturbed) if ceilings.disturbed > MOST else "measured now; the roofline of the tables"
    return f"{name}: copy {ceilings.copy_gbps:.3g} GB/s, {rates} ({noted})\n"
