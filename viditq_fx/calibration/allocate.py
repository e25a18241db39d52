"""allocate: spend a budget on the units that need it most, group by group, and write the choice into a Recipe.

    choose one scheme s(u) for each unit u of a group:  minimise sum of loss_u(s(u))  with  sum of cost_u(s(u)) <= share

Losses of different groups are never compared: that is what decoupled means (ViDiT-Q section 4.3, Table 8: one joint
search is worse than none). "greedy" is the paper's; "milp" finds the least sum.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib import import_module
from os import PathLike
from typing import Any

from viditq_fx.calibration.budget import Budget, Costs, Ladder, ladders, shares
from viditq_fx.calibration.sensitivity_table import SensitivityTable
from viditq_fx.calibration.units import Unit, plan_at
from viditq_fx.errors import RecipeError
from viditq_fx.recipe import Recipe, SitePlan
from viditq_fx.scheme import QuantScheme

_Method = Callable[[Mapping[str, Ladder], float], dict[str, int]]


def allocate(
    table: SensitivityTable,
    recipe: Recipe | str | PathLike[str],
    *,
    budget: float | Mapping[str, float],
    method: str = "greedy",
    costs: Costs | None = None,
) -> Recipe:
    """Choose a scheme for every unit of a table, within a budget, and return the recipe with these schemes.

    recipe: the one that was measured; balance, rotation and what is in no unit are taken over.
    budget: average bits of the units' weights (5.0, or {"bits": 5.0}), or {"bytes": n} of packed weights with their
        scales, or {"latency": t} in the unit of `costs`: {site: {scheme: latency}} or a function(site, scheme). Each
        group gets the share that its error asks for (calibration/budget.py) and what others could not spend of theirs.
    method: "greedy" promotes the unit of the largest loss that still fits its group's share, until none does;
        "milp" finds the least sum of losses within each share (HiGHS; needs scipy).

    Each SitePlan says in its reason what was chosen and why; provenance["mixed"] has shares and costs by group.

    Raises RecipeError for a budget that cannot be met, losses that are no finite numbers, a recipe that was not the
    measured one, or wrong arguments; ImportError for "milp" without scipy.
    """
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    if method not in _METHODS:
        raise RecipeError(f"method={method!r}; choose one of {', '.join(map(repr, _METHODS))}")
    _check(table, recipe)
    spent = Budget.of(budget, table.units)
    rungs = ladders(table, spent, costs)
    allowed = shares(table, rungs, spent)
    chosen: dict[str, int] = {}
    rest = 0.0
    for group in allowed:  # the neediest last: it gets what the others could not spend
        own = {unit.name: rungs[unit.name] for unit in table.units if unit.group == group}
        picked = _METHODS[method](own, allowed[group] + rest)
        rest += allowed[group] - sum(own[name][rung].cost for name, rung in picked.items())
        chosen |= picked
    sites = dict(recipe.sites)
    for unit in table.units:
        sites |= _plans(unit, rungs[unit.name][chosen[unit.name]].scheme, table, recipe, method)
    mixed = _provenance(table, rungs, chosen, spent, allowed, method)
    return replace(
        recipe, sites=dict(sorted(sites.items())), provenance={**recipe.provenance, "mixed": mixed}
    )


def greedy(rungs: Mapping[str, Ladder], share: float) -> dict[str, int]:
    """Name of a unit -> rung of its ladder: the largest loss first, as long as the next rung fits."""
    chosen = dict.fromkeys(rungs, 0)
    spent = sum(ladder[0].cost for ladder in rungs.values())
    while True:
        order = sorted(rungs, key=lambda name: (-rungs[name][chosen[name]].loss, name))
        for name in order:
            ladder, rung = rungs[name], chosen[name]
            if rung + 1 == len(ladder):
                continue
            after = spent + ladder[rung + 1].cost - ladder[rung].cost
            if after <= share:
                chosen[name], spent = rung + 1, after
                break
        else:
            return chosen


def milp(rungs: Mapping[str, Ladder], share: float) -> dict[str, int]:
    """Name of a unit -> rung of its ladder: the least sum of losses. Raises ImportError without scipy."""
    room = share - sum(ladder[0].cost for ladder in rungs.values())
    over = {
        (name, rung): choice.cost - ladder[0].cost
        for name, ladder in rungs.items()
        for rung, choice in enumerate(ladder)
        if rung == 0 or choice.cost - ladder[0].cost <= room
    }
    # Beyond their fractions HiGHS compares to 1e-6, so what it calls within the budget is counted again.
    limit = room
    for _ in range(_TIGHTER):
        chosen = _solve(rungs, over, limit)
        excess = sum(over[place] for place in chosen.items()) - room
        if excess <= 0.0:
            return chosen
        limit -= max(excess, room * 1e-6) * 2.0
    raise RecipeError(
        f"milp: no choice of {len(rungs)} units within {share:.9g} could be told from one above it; use method='greedy'"
    )


_TIGHTER = 8
_METHODS: dict[str, _Method] = {"greedy": greedy, "milp": milp}


def _solve(
    rungs: Mapping[str, Ladder], over: Mapping[tuple[str, int], float], limit: float
) -> dict[str, int]:
    """One integer programme: x[name, rung] is 0 or 1, one rung a unit, costs over the cheapest within the limit."""
    places = list(over)
    try:
        optimize: Any = import_module("scipy.optimize")
        sparse: Any = import_module("scipy.sparse")
    except ImportError as error:
        raise ImportError(
            "method='milp' is solved by scipy, which cannot be imported; run: pip install viditq_fx[mixed], or use "
            "method='greedy'"
        ) from error
    worst = max((ladder[0].loss - ladder[-1].loss for ladder in rungs.values()), default=0.0) or 1.0
    dearest = max(over.values(), default=0.0) or 1.0
    # Losses less each unit's own least, so that what differs is not lost beside what does not; HiGHS stops at 1e-6.
    loss = [1e4 * (rungs[name][rung].loss - rungs[name][-1].loss) / worst for name, rung in places]
    rows = {name: index for index, name in enumerate(rungs)}
    one_each = sparse.csr_array(
        ([1.0] * len(places), ([rows[name] for name, _ in places], range(len(places)))),
        shape=(len(rows), len(places)),
    )
    cost = sparse.csr_array([[over[place] / dearest for place in places]])
    found = optimize.milp(
        loss,
        integrality=[1] * len(places),
        bounds=optimize.Bounds(0, 1),
        constraints=[
            optimize.LinearConstraint(one_each, 1, 1),
            optimize.LinearConstraint(cost, -float("inf"), max(limit, 0.0) / dearest),
        ],
        options={"mip_rel_gap": 0.0},
    )
    if found.x is None:
        raise RecipeError(f"milp: HiGHS found no solution: {found.message}")
    return {name: rung for (name, rung), taken in zip(places, found.x, strict=True) if taken > 0.5}


def _check(table: SensitivityTable, recipe: Recipe) -> None:
    if not table.units:
        raise RecipeError("the table has no units: measure_sensitivity first")
    if table.edges:
        raise RecipeError("allocate reads no ranges of the timestep: measure with ranges=1")
    for unit in table.units:
        for site, shape in zip(unit.sites, unit.shapes, strict=True):
            plan = recipe.sites.get(site)
            known = site in recipe.sites or not recipe.shapes or site in recipe.shapes
            if not known or recipe.shapes.get(site, shape) != shape:
                raise RecipeError(
                    f"unit {unit.name!r}: the recipe has no site {site!r} of [N, K] = {list(shape)}; give the recipe "
                    "that was measured"
                )
            if plan is not None and plan.scheme is None:
                raise RecipeError(f"unit {unit.name!r}: the recipe keeps {site!r} in full precision")


def _plans(
    unit: Unit, scheme: str, table: SensitivityTable, recipe: Recipe, method: str
) -> dict[str, SitePlan]:
    lowest = table.schemes[0]
    losses = sorted(
        (table.loss(other, lowest) for other in table.units if other.group == unit.group), reverse=True
    )
    own = table.loss(unit, lowest)
    words = (
        f"mixed precision ({method}): {unit.group} loss {own:.3g} alone at {lowest}, the "
        f"{losses.index(own) + 1}. largest of {len(losses)}"
    )
    plans: dict[str, SitePlan] = {}
    for site, (_, depth) in zip(unit.sites, unit.shapes, strict=True):
        plan = plan_at(QuantScheme.parse(scheme), site, depth, recipe)
        reason = f"{words}; {plan.reason}" if plan.reason else words
        plans[site] = replace(plan, reason=reason)
    return plans


def _provenance(
    table: SensitivityTable,
    rungs: Mapping[str, Ladder],
    chosen: Mapping[str, int],
    budget: Budget,
    allowed: Mapping[str, float],
    method: str,
) -> dict[str, Any]:
    groups: dict[str, Any] = {}
    for group in table.groups():
        own = [unit for unit in table.units if unit.group == group]
        picked = [rungs[unit.name][chosen[unit.name]] for unit in own]
        weights = sum(unit.weights for unit in own)
        per = weights if budget.kind == "bits" else 1
        groups[group] = {
            "units": len(own),
            "weights": weights,
            "share": allowed[group] / per,
            "cost": sum(choice.cost for choice in picked) / per,
            "loss": sum(choice.loss for choice in picked),
        }
    return {
        "method": method,
        "budget": {budget.kind: budget.asked},
        "schemes": list(table.schemes),
        "groups": groups,
    }
