"""Ahead-of-time compilation: what each Triton kernel becomes on every GPU from sm_80 on, read without one.

Triton compiles for any target, and its wheel ships `cuobjdump`, so a laptop can see registers, spills, shared memory
and the very instructions. A kernel module exports `aot_cases()`, its tuned configurations with what they promise:

    python -m mimir_kernels.aot                                             # compile everything, print the table
    python -m mimir_kernels.aot --check tests/kernels/aot_table.json        # …and compare: CI's performance gate
    python -m mimir_kernels.aot --update tests/kernels/aot_table.json       # a deliberate change

The promises (no spills, shared memory that fits, NaN kept, tensor cores, 128-bit loads) hold for every Triton version.
The exact figures are compared only where the table has a section for the Triton minor version at hand: another version
allocates other registers.
TRITON_INTERPRET must be unset: an interpreted kernel is a Python function and cannot be compiled.
"""

import argparse
import concurrent.futures
import dataclasses
import hashlib
import importlib
import json
import multiprocessing
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Compute capability → bytes of shared memory that one block may ask for (CUDA's programming guide, table of
# technical specifications: what an SM has, less 1 kB).
SHARED_LIMITS = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 103: 232_448, 120: 101_376}
CAPABILITIES = tuple(SHARED_LIMITS)
# One of each generation of instructions. The others differ from it in their memory.
GENERATIONS = 80, 90, 100, 120
# Matrix instructions by generation: mma.sync (Ampere on), wgmma (Hopper), tcgen05 (Blackwell).
_TENSOR_CORE = re.compile(r"^(?:HMMA|IMMA|QMMA|DMMA|HGMMA|IGMMA|QGMMA|UTC\w*MMA)\b")
_SPILL = re.compile(r"^(?:STL|LDL)\b")
# Plain loads, asynchronous copies to shared memory (cp.async) and bulk copies (TMA) of 16 bytes or more a thread.
_VECTOR_LOAD = re.compile(r"^(?:LDG\S*\.128|LDGSTS\S*\.128|UBLKCP|UTMALDG)")
_VECTOR_STORE = re.compile(r"^(?:STG\S*\.128|UBLKCP|UTMASTG)")
# max and min give the number where the other operand is NaN, unless they say .NaN, which those of float64 cannot.
_LOSES_NAN = re.compile(r"\b(?:max|min)\.(?!\S*NaN)(?:\w+\.)*(?:f16|bf16|f32|f64)(?:x2)?\b")
_SASS_LINE = re.compile(r"/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")


@dataclass(frozen=True)
class AotCase:
    """One tuned configuration of one kernel, compiled as the launcher would.

    Attributes:
        name: `<module>.<what>`, once for each capability; `<name>/sm_<capability>` is the key in the table.
        kernel: the `@triton.jit` function (or an autotuned one around it).
        signature: run-time argument → Triton type, such as {"x_ptr": "*bf16", "n": "i32"}, in the kernel's order.
        constexprs: compile-time argument → value; also for arguments the launcher specialises, such as a stride of 1.
        divisible_by_16: integer arguments known to be multiples of 16. Pointers always are, as torch allocates.
        options: further compiler options, such as {"enable_fp_fusion": False}.
        vector_loads: promises 128-bit loads.    tensor_cores: promises matrix instructions.
        capabilities: compute capabilities (90 is sm_90) the configuration is compiled for: all that it is used on, if
            it takes much shared memory.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any] = field(default_factory=dict)
    divisible_by_16: Sequence[str] = ()
    num_warps: int = 4
    num_stages: int = 3
    options: Mapping[str, Any] = field(default_factory=dict)
    vector_loads: bool = False
    tensor_cores: bool = False
    capabilities: Sequence[int] = GENERATIONS


@dataclass(frozen=True)
class AotMetrics:
    """What Triton and ptxas made of a case. Bytes for memory, instruction counts for the rest."""

    registers: int
    shared: int
    stack: int
    spills: int
    tensor_cores: int
    vector_loads: int
    vector_stores: int
    loses_nan: int
    instructions: int


def compile_case(case: AotCase, capability: int) -> AotMetrics:
    """Compile `case` for sm_`capability` and read its machine code. Raises what `compile_kernel` raises."""
    compiled = compile_kernel(case, capability)
    return _read_cubin(compiled.asm["cubin"], compiled.metadata.shared, len(_LOSES_NAN.findall(compiled.asm["ptx"])))


def compile_kernel(case: AotCase, capability: int) -> Any:
    """Triton's compiled kernel of `case` for sm_`capability`. No GPU is needed; Triton's cache is used.

    Raises:
        RuntimeError: TRITON_INTERPRET is set.
        ValueError: the case does not name exactly the kernel's arguments.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    _require_compiler()
    kernel = case.kernel
    while not hasattr(kernel, "arg_names") or hasattr(kernel, "configs"):  # unwrap @autotune, @heuristics
        kernel = kernel.fn
    given = {*case.signature, *case.constexprs}
    if given != set(kernel.arg_names):
        raise ValueError(
            f"{case.name}: signature and constexprs must name the kernel's arguments;"
            f" missing {sorted(set(kernel.arg_names) - given)}, unknown {sorted(given - set(kernel.arg_names))}"
        )
    signature = {name: "constexpr" if name in case.constexprs else case.signature[name] for name in kernel.arg_names}
    aligned = [name for name, kind in signature.items() if kind.startswith("*") or name in set(case.divisible_by_16)]
    attrs = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    return triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=dict(case.constexprs), attrs=attrs),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": case.num_warps, "num_stages": case.num_stages, **case.options},
    )


def broken_promises(case: AotCase, capability: int, metrics: AotMetrics) -> list[str]:
    """What the compiled code should do and does not, in words; empty if all is well."""
    found = []
    if metrics.instructions < 8:
        found.append(f"only {metrics.instructions} instructions: the kernel body is gone")
    if metrics.spills:
        found.append(f"{metrics.spills} spill instructions: use a smaller tile or more warps")
    if metrics.shared > SHARED_LIMITS[capability]:
        limit = SHARED_LIMITS[capability]
        found.append(f"{metrics.shared} bytes of shared memory, {limit} allowed: use a smaller tile or fewer stages")
    if metrics.loses_nan:
        found.append(f"{metrics.loses_nan} max or min of floats that lose a NaN: write tl.where(x < low, low, x)")
    if case.tensor_cores and not metrics.tensor_cores:
        found.append("no tensor-core instruction: look at the operand dtype, input_precision and tile (≥ 16 each way)")
    if case.vector_loads and not metrics.vector_loads:
        found.append("no 128-bit load: look at divisible_by_16, tl.multiple_of and the order of the tile's axes")
    return found


def discover_cases() -> dict[str, tuple[AotCase, int]]:
    """`<name>/sm_<cc>` → the case and the capability, of every module here with `aot_cases() -> list[AotCase]`."""
    import mimir_kernels

    cases: dict[str, tuple[AotCase, int]] = {}
    for info in pkgutil.iter_modules(mimir_kernels.__path__):
        if info.name == "aot":  # it is running
            continue
        module = importlib.import_module(f"mimir_kernels.{info.name}")
        for case in getattr(module, "aot_cases", list)():
            for capability in case.capabilities:
                key = f"{case.name}/sm_{capability}"
                if key in cases:
                    raise ValueError(f"two AOT cases are named {key!r}: names are the keys of the table")
                cases[key] = case, capability
    return cases


def triton_minor() -> str:
    """`3.9` for Triton 3.9.0: registers are stable within it."""
    import triton

    return ".".join(triton.__version__.split(".")[:2])


def _read_cubin(cubin: bytes, dynamic_shared: int, loses_nan: int) -> AotMetrics:
    """Disassemble, or recall: it takes as long as compiling. The last two are not recorded in the binary."""
    import triton

    # This file is part of the key: whoever changes how SASS is read, reads it anew.
    key = hashlib.sha256(cubin + f"/{dynamic_shared}/{loses_nan}/".encode() + Path(__file__).read_bytes()).hexdigest()
    remembered = Path(triton.knobs.cache.dir) / "mimir_aot" / f"{key}.json"
    if remembered.exists():
        return AotMetrics(**json.loads(remembered.read_text()))
    metrics = _disassemble(cubin, dynamic_shared, loses_nan)
    remembered.parent.mkdir(parents=True, exist_ok=True)
    partial = remembered.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(dataclasses.asdict(metrics)))
    partial.replace(remembered)
    return metrics


def listing_of(cubin: bytes) -> tuple[str, Counter[str]]:
    """What cuobjdump prints of a kernel, and how often each SASS opcode stands in it, modifiers included.

    Raises:
        NotImplementedError: this Triton's cuobjdump does not know the architecture.
    """
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-res-usage", "-sass", file.name]
        run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise NotImplementedError(f"{tool} cannot read this: {run.stderr.strip()}")
    return run.stdout, Counter(match[1] for match in _SASS_LINE.finditer(run.stdout))


def _disassemble(cubin: bytes, dynamic_shared: int, loses_nan: int) -> AotMetrics:
    listing, opcodes = listing_of(cubin)
    resources = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED):(\d+)", listing)}

    def count(pattern: re.Pattern[str]) -> int:
        return sum(number for opcode, number in opcodes.items() if pattern.match(opcode))

    return AotMetrics(
        registers=resources["REG"],
        shared=dynamic_shared + resources["SHARED"],
        stack=resources["STACK"],
        spills=count(_SPILL),
        tensor_cores=count(_TENSOR_CORE),
        vector_loads=count(_VECTOR_LOAD),
        vector_stores=count(_VECTOR_STORE),
        loses_nan=loses_nan,
        instructions=opcodes.total() - opcodes["NOP"],
    )


def _require_compiler() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET=1 turns kernels into Python functions; unset it to compile them")


def _compile_by_key(key: str) -> AotMetrics | None:
    """A worker's job: a kernel does not pickle, its name does."""
    try:
        return compile_case(*discover_cases()[key])
    except NotImplementedError as error:  # Triton 3.6 compiles for sm_103, which its cuobjdump does not know
        print(f"left out: {key}: {error}", file=sys.stderr)
        return None


def compile_all(keys: Sequence[str], num_workers: int) -> dict[str, AotMetrics]:
    """Metrics of these keys of `discover_cases()` that can be read, compiled in `num_workers` fresh processes."""
    # Spawned, not forked: MLIR keeps threads and locks that a fork would copy half-way.
    with concurrent.futures.ProcessPoolExecutor(num_workers, multiprocessing.get_context("spawn")) as pool:
        found = zip(keys, pool.map(_compile_by_key, keys), strict=True)
        return {key: metrics for key, metrics in found if metrics is not None}


def _differences(expected: Mapping[str, Any], results: Mapping[str, AotMetrics]) -> list[str]:
    found = []
    for key, metrics in results.items():
        row = dataclasses.asdict(metrics)
        if key not in expected:
            found.append(f"{key}: not in the table")
        elif changed := [f"{k} {expected[key].get(k)} → {v}" for k, v in row.items() if expected[key].get(k) != v]:
            found.append(f"{key}: {', '.join(changed)}")
    return found


def _write_table(path: Path, results: Mapping[str, AotMetrics]) -> None:
    """One line a row, so that a diff of the table reads as a table."""
    table = json.loads(path.read_text()) if path.exists() else {}
    table[triton_minor()] = {key: dataclasses.asdict(metrics) for key, metrics in sorted(results.items())}
    sections = []
    for version, rows in sorted(table.items()):
        body = ",\n".join(f"    {json.dumps(key)}: {json.dumps(row)}" for key, row in rows.items())
        sections.append(f"  {json.dumps(version)}: {{\n{body}\n  }}")
    path.write_text("{\n" + ",\n".join(sections) + "\n}\n")


def _print_table(results: Mapping[str, AotMetrics]) -> None:
    columns = [f.name for f in dataclasses.fields(AotMetrics)]
    print(f"{'triton ' + triton_minor():<52}" + "".join(f"{name:>15}" for name in columns))
    for key, metrics in sorted(results.items()):
        print(f"{key:<52}" + "".join(f"{value:>15}" for value in dataclasses.astuple(metrics)))


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0 if every promise holds (and, with --check, every figure of the table)."""
    parser = argparse.ArgumentParser(prog="python -m mimir_kernels.aot", description=__doc__.splitlines()[0])
    table = parser.add_mutually_exclusive_group()
    table.add_argument("--check", type=Path, metavar="TABLE", help="compare with this table")
    table.add_argument("--update", type=Path, metavar="TABLE", help="write this Triton version's section anew")
    parser.add_argument("--capability", type=int, nargs="+", choices=CAPABILITIES, default=list(CAPABILITIES))
    parser.add_argument("--only", default="", metavar="PREFIX", help="cases whose name begins so, as `hsic.`")
    parser.add_argument("--workers", type=int, default=min(os.cpu_count() or 1, 8))
    args = parser.parse_args(argv)
    partial = bool(args.only) or set(args.capability) != set(CAPABILITIES)
    if args.update and partial:
        parser.error("--update writes the whole table: leave out --only and --capability")

    _require_compiler()
    cases = {
        key: (case, capability)
        for key, (case, capability) in discover_cases().items()
        if key.startswith(args.only) and capability in args.capability
    }
    results = compile_all(list(cases), args.workers)
    _print_table(results)
    problems = [
        f"{key}: {problem}" for key, metrics in results.items() for problem in broken_promises(*cases[key], metrics)
    ]
    if args.update:
        _write_table(args.update, results)
    if args.check:
        expected = json.loads(args.check.read_text()).get(triton_minor())
        if expected is None:
            print(f"{args.check} has no section for Triton {triton_minor()}: only the promises were checked")
        else:
            problems += _differences(expected, results)
            if not partial:
                problems += [f"{key}: in the table, not in the code" for key in expected.keys() - results.keys()]
    for problem in problems:
        print(f"FAILED {problem}", file=sys.stderr)
    if problems and args.check:
        print(f"If the change is meant: python -m mimir_kernels.aot --update {args.check}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
