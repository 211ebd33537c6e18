"""The times by which GPU calls choose their kernels, from sweeps.

`python -m benchmarks.gpu_choices SWEEP.jsonl... [--out FILE] [--update] [--hosts]
[--facts NAME=VALUE...]`

Reads what ``benchmarks.gpu_sweep`` wrote and writes what ``lka_kernels.gpu_choice`` reads. Where
files have the same family of the same case, the later one counts. ``--facts`` says what files
without a first line do not: device, date, and versions as torch=2.11.0.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path

from benchmarks import gpu_sweep, shapes
from lka_kernels import gpu_choice

OPERATORS = {"depthwise": "depthwise_conv2d", "adapter": "large_kernel_adapter"}
DIRECTIONS = {"dX": "backward_input", "dW": "backward_weight"}

# (operator, direction, layout, dtype, sizes); layout "" for the adapter.
Key = tuple[str, str, str, str, tuple[int, ...]]


def read(files: list[Path]) -> tuple[dict, list[dict]]:
    """(facts of the last first line, all lines with seconds; "host" only of files that have one).

    What earlier sweeps measured of the host was measured once, and of calls that have changed.
    """
    facts, lines = {}, []
    for file in files:
        has_facts = False
        for text in file.read_text().splitlines():
            line = json.loads(text)
            if "operator" not in line:
                facts, has_facts = line, True
            elif "seconds" in line and line.get("error", 0) < 0.05:
                if not has_facts:
                    line.pop("host", None)
                lines.append(line)
    return facts, lines


def sizes(line: dict) -> tuple[int, ...]:
    """The numbers of ``gpu_choice.SIZES``; of older lines by the name of the shape."""
    names = gpu_choice.SIZES[OPERATORS[line["operator"]]]
    if "batch" not in line:
        (shape,) = {
            shape
            for shape in shapes.DEPTHWISE + shapes.TABLE + shapes.ADAPTER
            if shape.name == line["shape"]
        }
        # The batch is the first number of the size in words.
        batch = int(line["size"].split(",")[0].removeprefix("("))
        line = line | gpu_sweep.numbers(line["operator"], shape._replace(batch=batch))
    return tuple(line[name] for name in names)


def key_of(line: dict) -> Key:
    """The case of a line, without its family."""
    adapter = line["operator"] == "adapter"
    direction = DIRECTIONS.get(line["direction"], line["direction"])
    layout = "" if adapter else line["layout"]
    return OPERATORS[line["operator"]], direction, layout, line["dtype"], sizes(line)


def merged(lines: list[dict]) -> dict[Key, dict[str, float]]:
    """Microseconds of every family of every case.

    What was measured of PyTorch's adapter backward includes its forward pass, which is taken off.
    """
    found: dict[Key, dict[str, float]] = {}
    for line in lines:
        key = key_of(line)
        if line["family"] in gpu_choice.FAMILIES[key[0]]:
            found.setdefault(key, {})[line["family"]] = 1e6 * line["seconds"]
    for key, families in list(found.items()):
        operator, direction, *rest = key
        if operator == "large_kernel_adapter" and direction == "backward" and "torch" in families:
            forward = found.get((operator, "forward", *rest), {}).get("torch")
            if forward is None or forward >= families["torch"]:
                del families["torch"]
            else:
                families["torch"] -= forward
    return {key: families for key, families in found.items() if families}


def hosts(lines: list[dict]) -> dict:
    """Operator, direction, family -> median microseconds of the host over all cases."""
    found: dict = {}
    for line in lines:
        operator = OPERATORS[line["operator"]]
        if "host" in line and line["family"] in gpu_choice.FAMILIES[operator]:
            direction = DIRECTIONS.get(line["direction"], line["direction"])
            if (operator, direction, line["family"]) != (
                "large_kernel_adapter", "backward", "torch",
            ):  # fmt: skip
                of_direction = found.setdefault(operator, {}).setdefault(direction, {})
                of_direction.setdefault(line["family"], []).append(1e6 * line["host"])
    return {
        operator: {
            direction: {family: rounded(statistics.median(t)) for family, t in families.items()}
            for direction, families in directions.items()
        }
        for operator, directions in found.items()
    }


def rounded(number: float) -> float | int:
    """To 3 digits."""
    number = float(f"{number:.3g}")
    return int(number) if number == int(number) else number


def recorded(before: dict) -> dict[Key, dict[str, float]]:
    """As ``merged``, of what a file has."""
    found: dict[Key, dict[str, float]] = {}
    for operator, families in gpu_choice.FAMILIES.items():
        numbers = len(gpu_choice.SIZES[operator])
        columns = [*gpu_choice.SIZES[operator], *families]
        if before[operator]["columns"] != columns:
            raise ValueError(
                f"columns of {operator} are {before[operator]['columns']}, not {columns}"
            )
        for name, rows in before[operator]["cases"].items():
            direction, *layout, dtype = name.split()
            for row in rows:
                times = dict(zip(families, row[numbers:], strict=True))
                key = (operator, direction, " ".join(layout), dtype, tuple(row[:numbers]))
                found[key] = {family: t for family, t in times.items() if t is not None}
    return found


def content(
    facts: dict, lines: list[dict], before: dict | None = None, with_hosts: bool = False
) -> dict:
    """What goes into the file, which has what is in ``before`` where no line says otherwise."""
    before = before or {}
    known = {name: before.get(name) for name in ("device", "date")} | {
        name: facts[name] for name in ("device", "date") if facts.get(name)
    }
    if before.get("device") not in (None, known["device"]):
        raise ValueError(
            f"times of {before['device']} are not brought up to date by {known['device']}'s"
        )
    everything = recorded(before) if before else {}
    for key, times in merged(lines).items():
        everything[key] = everything.get(key, {}) | times
    host = hosts(lines) if with_hosts else {}
    for operator, directions in before.get("host", {}).items():
        for direction, families in directions.items():
            of_direction = host.setdefault(operator, {}).setdefault(direction, {})
            of_direction.update({f: t for f, t in families.items() if f not in of_direction})
    found = {
        **known,
        "versions": before.get("versions", {}) | facts.get("versions", {}),
        "host": host,
    }
    for operator, families in gpu_choice.FAMILIES.items():
        rows: dict[str, list] = {}
        for key, times in sorted(everything.items()):
            of_operator, direction, layout, dtype, numbers = key
            if of_operator == operator:
                name = " ".join(filter(None, (direction, layout, dtype)))
                microseconds = [times.get(family) for family in families]
                rows.setdefault(name, []).append(
                    [*numbers, *(None if t is None else rounded(t) for t in microseconds)]
                )
        columns = [*gpu_choice.SIZES[operator], *families]
        found[operator] = {"columns": columns, "cases": rows}
    return found


def as_text(found: dict) -> str:
    """JSON with one case a line."""
    parts = [f"{json.dumps(name)}: {json.dumps(found[name])}" for name in found
             if name not in gpu_choice.FAMILIES]  # fmt: skip
    for operator in gpu_choice.FAMILIES:
        situations = [
            f"{json.dumps(name)}: [\n" + ",\n".join(map(json.dumps, rows)) + "\n]"
            for name, rows in found[operator]["cases"].items()
        ]
        columns = json.dumps(found[operator]["columns"])
        cases = "{\n" + ",\n".join(situations) + "\n}"
        parts.append(f'"{operator}": {{"columns": {columns}, "cases": {cases}}}')
    return "{\n" + ",\n".join(parts) + "\n}\n"


def losses(operator: str) -> list[tuple[float, str]]:
    """(time of the chosen family / the least, in words) of every case, chosen without the case.

    What a choice between the measured cases may be expected to cost.
    """
    found = []
    for situation, everything in gpu_choice.cases(operator).items():
        direction = situation[0]
        for case in everything:
            families = [f for f in gpu_choice.FAMILIES[operator] if f in case.microseconds]
            if operator == "large_kernel_adapter" and "torch" in families:
                families.remove("torch")
            others = [other for other in everything if other.sizes != case.sizes]
            hosts = {f: gpu_choice.host_microseconds(operator, direction, f) for f in families}
            chosen = gpu_choice.estimates(others, case.logs, case.work, families, hosts)
            if len(families) < 2 or len(chosen) < 2:
                continue
            true = {f: max(case.microseconds[f], hosts[f]) for f in families}
            best = min(true, key=true.get)
            taken = gpu_choice.least(chosen)
            words = f"{' '.join(map(str, situation))} {case.sizes}: {taken} instead of {best}"
            found.append((true[taken] / true[best], words))
    return found


def main(arguments: list[str] | None = None) -> None:
    """Write the file, and say what choices by it may cost."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sweeps", type=Path, nargs="+", metavar="SWEEP.jsonl")
    parser.add_argument("--out", type=Path, default=gpu_choice.DATA)
    parser.add_argument(
        "--update", action="store_true", help="keep what the file has of what was not measured"
    )
    parser.add_argument(
        "--hosts",
        action="store_true",
        help="also what the host needed, where all families of an operator were measured at once",
    )
    parser.add_argument("--facts", nargs="+", default=[], metavar="NAME=VALUE")
    options = parser.parse_args(arguments)
    facts, lines = read(options.sweeps)
    for name, _, value in (fact.partition("=") for fact in options.facts):
        if name in ("device", "date"):
            facts[name] = value
        else:
            facts["versions"] = {**facts.get("versions", {}), name: value}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    before = json.loads(options.out.read_text()) if options.update else None
    options.out.write_text(as_text(content(facts, lines, before, options.hosts)))
    print(f"{options.out}: {len(merged(lines))} cases, {options.out.stat().st_size / 1e3:.0f} kB")
    if options.out != gpu_choice.DATA:
        return
    gpu_choice.forget()
    for operator in gpu_choice.FAMILIES:
        found = sorted(losses(operator), reverse=True)
        if found:
            mean = math.exp(statistics.fmean(math.log(loss) for loss, _ in found))
            print(
                f"{operator}: with each case left out, its choice takes {mean:.3f} times the least "
                "in the geometric mean; the worst:"
            )
            for loss, words in found[:10]:
                print(f"  {loss:5.2f}  {words}")


if __name__ == "__main__":
    main()
