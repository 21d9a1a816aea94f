"""How long the knapsack takes: seconds, objective, proved bound and gap for seeded problems of 500 groups of 50 options.

Each problem comes twice: with independent groups, and as a chain in which every group influences the next.

python benchmarks/knapsack.py [--groups 500] [--options 50] [--seeds 3]
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import numpy as np

from intaglio.solver import Budget, Cost, Option, Problem, solve, total_cost


def network(groups: int, options: int, seed: int) -> Problem:
    """A problem shaped like a network: option 0 keeps the layer, the others shrink it noisily, most with a shared decoder."""
    rng = np.random.default_rng(seed)
    decoders = {f"decoder{index}": Cost(int(size_bytes)) for index, size_bytes in enumerate(rng.integers(200, 5000, 6))}
    layers = []
    for _ in range(groups):
        size_bytes = 4 * int(rng.lognormal(11, 1))
        latency_s = size_bytes * 2.5e-10
        sensitivity = rng.lognormal(-9, 1.5)
        layer = [Option(size_bytes, latency_s, 0.0)]
        for ratio in rng.uniform(0.03, 1.0, options - 1):
            divergence = sensitivity * np.exp(-6 * ratio) * rng.lognormal(0, 0.5)
            shared = (f"decoder{rng.integers(6)}",) if rng.random() < 0.8 else ()
            layer.append(Option(round(size_bytes * ratio), latency_s * rng.uniform(0.3, 1.4), float(divergence), shared))
        layers.append(tuple(layer))
    return Problem(tuple(layers), Cost(10_000, 1e-4, 0.0), decoders)


def chained(problem: Problem, seed: int) -> Problem:
    """The same groups as a chain of layers in which each one reads what the one before it wrote.

    About half of the options run in integers: faster, and noisier. Between an integer and a float layer the value is quantized
    or dequantized, which takes about a tenth of the layer's time; the network's input and output are float. Some options prune
    the channels that they write, by one of three masks, and some exist only where the layer before took their mask.
    """
    rng = np.random.default_rng(seed)
    last = len(problem.groups)
    resources = dict(problem.shared) | {f"mask {index}.{mask}": Cost() for index in range(1, last + 1) for mask in range(3)}
    layers = []
    for index, group in enumerate(problem.groups):
        change_s = group[0].latency_s * rng.uniform(0.02, 0.2)
        resources[f"quantized {index}"] = Cost(120, change_s)
        resources[f"float {index}"] = Cost(90, change_s) if index else Cost()
        layers.append((_linked(group[0], index, "float"), *(_drawn(option, index, rng) for option in group[1:])))
    resources[f"quantized {last}"] = Cost()
    resources[f"float {last}"] = Cost(90, 1e-6)
    output = (Option(0, 0.0, 0.0, (f"float {last}",)),)
    return Problem((*layers, output), problem.base, resources)


def _drawn(option: Option, index: int, rng: np.random.Generator) -> Option:
    """The option of layer `index` in integers or float, perhaps with a mask."""
    if rng.random() < 0.5:
        faster = replace(option, latency_s=option.latency_s * rng.uniform(0.4, 0.8), divergence=option.divergence * rng.uniform(1.0, 1.5))
        linked = _linked(faster, index, "quantized")
    else:
        linked = _linked(option, index, "float")
    mask = rng.integers(3)
    drawn = rng.random()
    if drawn < 0.2:
        return replace(linked, provides=(*linked.provides, f"mask {index + 1}.{mask}"))
    if drawn < 0.3 and index:
        return replace(linked, size_bytes=round(linked.size_bytes * 0.8), requires=(f"mask {index}.{mask}",))
    return linked


def _linked(option: Option, index: int, kind: str) -> Option:
    """The option of layer `index` as one that reads and writes values of a kind."""
    return replace(option, shared=(*option.shared, f"{kind} {index}"), provides=(f"{kind} {index + 1}",))


def budgets(problem: Problem) -> dict[str, Budget]:
    """Named budgets for a `network`, chained or not, relative to the unchanged one; the last is infeasible."""
    whole = total_cost(problem, [0] * len(problem.groups))
    size_bytes, latency_s = float(whole.size_bytes), whole.latency_s
    return {
        "error | size": Budget(0.25 * size_bytes),
        "error | latency": Budget(latency_s=0.6 * latency_s),
        "error | size, latency": Budget(0.25 * size_bytes, 0.6 * latency_s),
        "size | error, latency": Budget(None, 0.6 * latency_s, 0.005, "size"),
        "latency | error": Budget(divergence=0.001, minimize="latency"),
        "error | size, latency, error": Budget(0.3 * size_bytes, 0.7 * latency_s, 0.05),
        "error | too small": Budget(0.02 * size_bytes, 0.7 * latency_s),
    }


def main() -> None:
    """Print one line per problem and budget."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, default=500)
    parser.add_argument("--options", type=int, default=50)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    print(f"{'seed':>4} {'groups':8} {'minimize | limits':28} {'status':10} {'seconds':>7} {'gap':>8} {'objective':>12} {'bound':>12}")
    for seed in range(arguments.seeds):
        independent = network(arguments.groups, arguments.options, seed)
        for kind, problem in {"alone": independent, "chained": chained(independent, seed)}.items():
            for name, budget in budgets(problem).items():
                found = solve(problem, budget)
                figures = f"{found.seconds:7.2f} {found.gap:8.1e} {found.objective:12.6g} {found.bound:12.6g}"
                print(f"{seed:4} {kind:8} {name:28} {found.status:10} {figures}", flush=True)


if __name__ == "__main__":
    main()
