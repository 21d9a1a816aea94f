"""Which option each group gets: constrained choice over size, latency and divergence, with certificates."""

from .budget import QUANTITIES, Budget, Cost, Nearest, Quantity
from .knapsack import Solution, Status, solve
from .problem import Option, Problem, total_cost

__all__ = [
    "QUANTITIES",
    "Budget",
    "Cost",
    "Nearest",
    "Option",
    "Problem",
    "Quantity",
    "Solution",
    "Status",
    "solve",
    "total_cost",
]
