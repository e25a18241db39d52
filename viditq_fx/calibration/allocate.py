"""allocate: spend a budget on the units that need it most, group by group, and write the choice into a Recipe.

    choose one scheme s(u) for each unit u of a group:  minimise sum of loss_u(s(u))  with  sum of cost_u(s(u)) <= share

where the table is in ranges of the timestep, for each unit in each range.

Losses of different groups are never compared: that is what decoupled means (ViDiT-Q section 4.3, Table 8: one joint
search is worse than none). "greedy" is the paper's; "milp" finds the least sum.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from os import PathLike
from typing import Any, TypeVar

from viditq_fx.calibration.budget import Budget, Choice, Costs, Entry, Key, Ladder, ladders, shares
from viditq_fx.calibration.sensitivity_table import SensitivityTable
from viditq_fx.calibration.units import Unit, plan_in_ranges
from viditq_fx.errors import RecipeError
from viditq_fx.recipe import Recipe, SitePlan
from viditq_fx.scheme import QuantScheme

_K = TypeVar("_K", bound=Hashable)
_Method = Callable[[Mapping[Key, Ladder], float], dict[Key, int]]


def allocate(
    table: SensitivityTable,
    recipe: Recipe | str | PathLike[str],
    *,
    budget: float | Mapping[str, float],
    method: str = "greedy",
    costs: Costs | None = None,
) -> Recipe:
    """Choose a scheme for every unit of a table, within a budget, and return the recipe with these schemes.

    A table in ranges of the timestep (ViDiT-Q section 4.3) gives a recipe in ranges: a unit may have other schemes in
    each. Such a recipe is for torch.compile, which runs each call at the schemes of its timestep's range.

    recipe: the one that was measured; balance, rotation and what is in no unit are taken over.
    budget: average bits of the units' weights (5.0, or {"bits": 5.0}), or {"bytes": n} of packed weights with their
        scales, or {"latency": t} in the unit of `costs`: {site: {scheme: latency}} or a function(site, scheme). Each
        group gets the share that its error asks for (calibration/budget.py) and what others could not spend of theirs.
        In ranges, bits and latency are averages over the calls of the run that was measured; a budget of bytes gives
        each unit one scheme for all ranges, since all forms of a weight are kept.
    method: "greedy" promotes the unit (in a range) of the largest loss that still fits its group's share, until none
        does; "milp" finds the least sum of losses within each share (HiGHS; needs scipy).

    Each SitePlan says in its reason what was chosen and why; provenance["mixed"] has shares and costs by group, and
    average bits by range.

    Raises RecipeError for a budget that cannot be met, losses that are no finite numbers, a recipe that was not the
    measured one, or wrong arguments; ImportError for "milp" without scipy.
    """
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    if method not in _METHODS:
        raise RecipeError(f"method={method!r}; choose one of {', '.join(map(repr, _METHODS))}")
    _check(table, recipe)
    _check_ranges(table, recipe)
    spent = Budget.of(budget, table)
    entries = spent.entries(table)
    rungs = ladders(table, entries, spent, costs)
    allowed = shares(table, entries, rungs, spent)
    chosen: dict[Key, Choice] = {}
    rest = 0.0
    for group in allowed:  # the neediest last: it gets what the others could not spend
        own = {entry.key: rungs[entry.key] for entry in entries if entry.unit.group == group}
        picked = _METHODS[method](own, allowed[group] + rest)
        chosen |= {key: own[key][rung] for key, rung in picked.items()}
        rest += allowed[group] - sum(chosen[key].cost for key in own)
    schemes = _schemes(entries, chosen, len(table.parts))
    sites = dict(recipe.sites)
    for unit in table.units:
        sites |= _plans(unit, schemes[unit.name], table, recipe, method)
    parted = any(plan.by_range for plan in sites.values())
    mixed = _provenance(table, entries, chosen, spent, allowed, method)
    if table.edges:
        mixed["ranges"] = _told_by_range(table, schemes)
    return replace(
        recipe,
        sites=dict(sorted(sites.items())),
        provenance={**recipe.provenance, "mixed": mixed},
        range_edges=table.edges if parted else (),
        timestep=table.timestep if parted else recipe.timestep,
    )


def greedy(rungs: Mapping[_K, Ladder], share: float) -> dict[_K, int]:
    """Key of an entry -> rung of its ladder: the largest loss first, as long as the next rung fits."""
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


def milp(rungs: Mapping[_K, Ladder], share: float) -> dict[_K, int]:
    """Key of an entry -> rung of its ladder: the least sum of losses. Raises ImportError without scipy."""
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


def _solve(rungs: Mapping[_K, Ladder], over: Mapping[tuple[_K, int], float], limit: float) -> dict[_K, int]:
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


def _check_ranges(table: SensitivityTable, recipe: Recipe) -> None:
    if recipe.timestep is not None and table.timestep not in (None, recipe.timestep):
        raise RecipeError(
            f"the recipe's timestep is the argument {recipe.timestep!r}, and the table's ranges are of "
            f"{table.timestep!r}; give the recipe that was measured"
        )
    measured = {site for unit in table.units for site in unit.sites}
    left = [site for site, plan in recipe.sites.items() if plan.by_range and site not in measured]
    if left and recipe.range_edges != table.edges:
        raise RecipeError(
            f"the recipe has schemes by range of the timestep for {left[0]!r}, which is in no unit, and the table "
            f"parts it at {list(table.edges)}, not at {list(recipe.range_edges)}; give the recipe that calibrate made"
        )


def _schemes(entries: Sequence[Entry], chosen: Mapping[Key, Choice], parts: int) -> dict[str, list[str]]:
    """Name of a unit -> its scheme in each part of the table."""
    schemes = {entry.unit.name: [""] * parts for entry in entries}
    for entry in entries:
        for part in entry.parts:
            schemes[entry.unit.name][part] = chosen[entry.key].scheme
    return schemes


def _plans(
    unit: Unit, schemes: Sequence[str], table: SensitivityTable, recipe: Recipe, method: str
) -> dict[str, SitePlan]:
    lowest, parts = table.schemes[0], range(len(table.parts))
    losses = sorted(
        (
            table.loss(other, lowest, part)
            for other in table.units
            if other.group == unit.group
            for part in parts
        ),
        reverse=True,
    )
    own = [table.loss(unit, lowest, part) for part in parts]
    place = f"{losses.index(max(own)) + 1}. largest of {len(losses)}"
    words = f"mixed precision ({method}): {unit.group} loss {own[0]:.3g} alone at {lowest}, the {place}"
    if table.edges:
        told = ", ".join(f"{loss:.3g}" for loss in own)
        words = (
            f"mixed precision by range of the timestep ({method}): {unit.group} losses {told} alone at {lowest}, the "
            f"worst the {place}"
        )
    parsed = [QuantScheme.parse(scheme) for scheme in schemes]
    plans: dict[str, SitePlan] = {}
    for site, (_, depth) in zip(unit.sites, unit.shapes, strict=True):
        plan = plan_in_ranges(parsed, site, depth, recipe)
        reason = f"{words}; {plan.reason}" if plan.reason else words
        plans[site] = replace(plan, reason=reason)
    return plans


def _provenance(
    table: SensitivityTable,
    entries: Sequence[Entry],
    chosen: Mapping[Key, Choice],
    budget: Budget,
    allowed: Mapping[str, float],
    method: str,
) -> dict[str, Any]:
    groups: dict[str, Any] = {}
    for group in table.groups():
        own = [unit for unit in table.units if unit.group == group]
        picked = [chosen[entry.key] for entry in entries if entry.unit.group == group]
        weights = sum(unit.weights for unit in own)
        groups[group] = {
            "units": len(own),
            "weights": weights,
            "share": budget.average(allowed[group], weights),
            "cost": budget.average(sum(choice.cost for choice in picked), weights),
            "loss": sum(choice.loss for choice in picked),
        }
    return {
        "method": method,
        "budget": {budget.kind: budget.asked},
        "schemes": list(table.schemes),
        "groups": groups,
    }


def _told_by_range(table: SensitivityTable, schemes: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Average bits of the units' weights in each range, from the lowest timesteps to the highest."""
    weights = sum(unit.weights for unit in table.units)
    bits = [
        sum(QuantScheme.parse(schemes[unit.name][part]).weight_bits * unit.weights for unit in table.units)
        for part in range(len(table.parts))
    ]
    return {
        "edges": list(table.edges),
        "calls": list(table.calls),
        "bits": [total / weights for total in bits],
    }
