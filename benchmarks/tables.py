"""The tables of docs/performance.md, as Markdown."""

from __future__ import annotations

from benchmarks.results import OURS, Key, Results, Row, best_peer, geometric_mean

DIRECTIONS = ("forward", "dX", "dW", "forward+backward")
TRAINING = "training_step"
LARGE_KERNEL = 13


def title(run: Results) -> str:
    """Device, dtype, threads."""
    facts = run.facts
    threads = f"{facts['threads']} thread" + ("s" if facts["threads"] != 1 else "")
    return f"{facts['device_name']}, {facts['dtype']}" + (
        f", {threads}" if facts["device"] == "cpu" else ""
    )


def rated(results: Results, operator: str, direction: str) -> list[tuple[Key, dict, str]]:
    """(case, peers, best peer) of an operator and direction, worst case first."""
    found = [
        (key, peers, best_peer(peers))
        for key, peers in results.cases.items()
        if (key.operator, key.direction) == (operator, direction) and OURS in peers
    ]
    found = [entry for entry in found if entry[2] is not None]
    return sorted(found, key=lambda entry: entry[1][entry[2]].ratio.median)


def operators(results: Results) -> list[str]:
    """The operators measured, without the training step."""
    return sorted({key.operator for key in results.cases} - {TRAINING})


def summary(results: Results, *, by_kernel: bool) -> list[str]:
    """One line per operator and direction; ``by_kernel`` adds lines for small and large kernels."""
    rows = []
    for operator in operators(results):
        for direction in DIRECTIONS:
            entries = rated(results, operator, direction)
            rows += _summary_row(f"`{operator}` {direction}", entries)
            if not by_kernel:
                continue
            large = [e for e in entries if e[1][OURS].info["kernel"] >= LARGE_KERNEL]
            small = [e for e in entries if e[1][OURS].info["kernel"] < LARGE_KERNEL]
            rows += _summary_row(f"– K < {LARGE_KERNEL}", small)
            rows += _summary_row(f"– K ≥ {LARGE_KERNEL}", large)
            direct = [(key, peers, _better_layout(peers)) for key, peers, _ in large]
            direct = [entry for entry in direct if entry[2] is not None]
            rows += _summary_row(f"– K ≥ {LARGE_KERNEL}, over torch's better layout", direct)
    return table(("", "cases", "worst", "geometric mean", "slower than a peer"), rows)


def _better_layout(peers: dict[str, Row]) -> str | None:
    """The faster of torch's direct convolutions, without torch.fft and other libraries."""
    names = ("torch_contiguous", "torch_channels_last")
    return best_peer({name: peers[name] for name in names if name in peers})


def _summary_row(title: str, entries: list) -> list[tuple]:
    if not entries:
        return []
    ratios = [peers[name].ratio.median for _, peers, name in entries]
    slower = sum(ratio < 1 for ratio in ratios)
    return [(title, len(ratios), f"{min(ratios):.2f}×", f"{geometric_mean(ratios):.2f}×", slower)]


def cases(results: Results, operator: str, direction: str) -> list[str]:
    """All cases of an operator and direction, worst first."""
    entries = rated(results, operator, direction)
    names = list(dict.fromkeys(n for _, peers, _ in entries for n in peers if n != OURS))
    with_memory = direction == "forward+backward"
    header = ["case", "layout", "ours", "best peer", *names, "of the floor"]
    header += ["peak memory"] if with_memory else []
    rows = []
    for key, peers, best in entries:
        ours, spread = peers[OURS], peers[best].ratio
        cells = [f"{key.shape} {key.size}", key.layout, milliseconds(ours)]
        cells.append(f"**{spread.median:.2f}×** ({spread.q1:.2f}–{spread.q3:.2f})")
        cells += [_ratio(peers.get(name)) for name in names]
        cells.append(f"{100 * ours.info['fraction_of_floor']:.0f} %")
        if with_memory:
            cells.append(_memory(ours, peers[best]))
        rows.append(cells)
    return table(header, rows)


def training(results: Results) -> list[str]:
    """The training steps: what each variant trains and takes."""
    rows = [
        (
            f"{key.shape} {key.size}",
            row.info["trains"],
            milliseconds(row),
            _share(row.info.get("adapter_share")),
            f"{row.info['peak_bytes'] / 2**20:.0f} MiB",
        )
        for key, peers in results.cases.items()
        if key.operator == TRAINING
        for row in peers.values()
    ]
    header = ("network", "trains", "step", "adapters' share of the step", "peak memory")
    return table(header, rows) if rows else []


def milliseconds(row: Row) -> str:
    """The median."""
    value = 1e3 * row.seconds.median
    return f"{value:.0f} ms" if value >= 100 else f"{value:.3g} ms"


def _ratio(row: Row | None) -> str:
    if row is None or row.ratio is None:
        return "–"
    return f"{row.ratio.median:.2f}×" + ("†" if row.ratio_rounds < 3 else "")


def _memory(ours: Row, best: Row) -> str:
    if "peak_bytes" not in ours.info or "peak_bytes" not in best.info:
        return "–"
    ours, best = (row.info["peak_bytes"] / 2**20 for row in (ours, best))
    return f"{ours:.1f} MiB, best peer {best:.1f}"


def _share(share: dict | None) -> str:
    if share is None:
        return "–"
    q1, median, q3 = (100 * share[name] for name in ("q1", "median", "q3"))
    return f"{median:.1f} % ({q1:.1f} to {q3:.1f})"


def table(header, rows) -> list[str]:
    """Lines of a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(str(cell) for cell in line) + " |" for line in lines] + [""]
