"""Pickers that take rows near queries, against the formulas written out as plain loops."""

from __future__ import annotations

import heapq

import numpy as np
import pytest

from ftrun import cli
from ftrun.errors import ConfigError
from ftrun.select.base import Budget, Table
from ftrun.select.geometry.nearest import best_places, nearest_rows
from ftrun.select.geometry.transport import sinkhorn
from ftrun.select.pickers.doubly_greedy import DoublyGreedy
from ftrun.select.pickers.knn_kde import KnnKde
from ftrun.select.pickers.knn_uniform import KnnUniform
from ftrun.select.pickers.round_robin import RoundRobin
from ftrun.select.pickers.uot import Uot
from ftrun.training.scoring import Similarity

ROWS, QUERIES = 120, 7
PICKERS = [
    RoundRobin(),
    RoundRobin(on_duplicate="skip_turn"),
    DoublyGreedy(),
    Uot(),
    KnnUniform(alpha=0.4),
    KnnKde(alpha=0.4),
]


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def made(seed: int = 0, queries: int = QUERIES, rows: int = ROWS, tasks: int = 1) -> Table:
    """Rows around the queries and away from them, some of them nearly alike."""
    rng = np.random.default_rng(seed)
    wanted = unit(rng.normal(size=(queries, 6)))
    vectors = unit(np.repeat(rng.normal(size=(rows // 3, 6)), 3, axis=0) + 0.2 * rng.normal(size=(rows, 6)))
    similarity = Similarity((wanted @ vectors.T).astype(np.float32), np.sort(np.arange(queries) % tasks))
    highest = similarity.matrix.max(axis=0).astype(np.float64)
    lengths = rng.integers(5, 50, rows)
    return Table({"similarity": highest}, lengths, embeddings=vectors.astype(np.float32), similarity=similarity)


def pick(picker, table: Table, ctx, rows: int, candidates: np.ndarray | None = None) -> list[int]:
    candidates = np.arange(len(table)) if candidates is None else candidates
    return picker.pick(table, candidates, "similarity", Budget(rows=rows), ctx).tolist()


@pytest.mark.parametrize("picker", PICKERS, ids=repr)
def test_larger_budgets_continue_smaller_ones(picker, context):
    table, ctx = made(), context()
    whole = pick(picker, table, ctx, ROWS)
    assert sorted(whole) == list(range(ROWS))
    for rows in (1, 5, 40):
        assert pick(picker, table, ctx, rows) == whole[:rows]


@pytest.mark.parametrize("picker", PICKERS, ids=repr)
def test_only_candidates_are_picked(picker, context):
    """Rows that are no candidates change nothing: the picks are those of a pool without them."""
    table, ctx = made(), context()
    candidates = np.flatnonzero(np.arange(ROWS) % 3 != 1)
    assert table.similarity is not None and table.embeddings is not None
    smaller = Table(
        {}, table.lengths[candidates], embeddings=table.embeddings[candidates],
        similarity=Similarity(table.similarity.matrix[:, candidates], table.similarity.task),
    )  # fmt: skip
    expected = candidates[pick(picker, smaller, ctx, 25)].tolist()
    assert pick(picker, table, ctx, 25, candidates[::-1]) == expected


@pytest.mark.parametrize("picker", [p for p in PICKERS if not isinstance(p, KnnUniform)], ids=repr)
def test_the_order_of_the_pool_does_not_matter(picker, context):
    """The same rows are taken from a shuffled pool. Masses of knn_uniform are often equal: ties go by place."""
    table, ctx = made(), context()
    order = np.random.default_rng(1).permutation(ROWS)
    assert table.similarity is not None and table.embeddings is not None
    shuffled = Table(
        {}, table.lengths[order], embeddings=table.embeddings[order],
        similarity=Similarity(table.similarity.matrix[:, order], table.similarity.task),
    )  # fmt: skip
    rows = 4 if isinstance(picker, KnnKde) else 30
    assert order[pick(picker, shuffled, ctx, rows)].tolist() == pick(picker, table, ctx, rows)


@pytest.mark.parametrize("picker", PICKERS, ids=repr)
def test_a_token_budget_is_kept(picker, context):
    table, ctx = made(), context()
    picked = picker.pick(table, np.arange(ROWS), "similarity", Budget(tokens=300), ctx)
    more = pick(picker, table, ctx, len(picked) + 1)
    assert more[:-1] == picked.tolist()
    assert table.lengths[picked].sum() <= 300 < table.lengths[more].sum()


@pytest.mark.parametrize("picker", PICKERS, ids=repr)
def test_a_scorer_without_queries_is_refused(picker, context):
    assert picker.needs_similarity
    with pytest.raises(ConfigError, match="near your queries"):
        pick(picker, Table({"similarity": np.ones(3)}, np.ones(3, int)), context(), 1)


# ---- round robin, doubly greedy ----


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("duplicate", ["next_best", "skip_turn"])
@pytest.mark.parametrize("turns,tasks", [("auto", 1), ("queries", 3), ("auto", 3)])
def test_round_robin_against_a_plain_loop(duplicate, turns, tasks, tied, context):
    table = made(tasks=tasks)
    assert table.similarity is not None
    matrix = table.similarity.matrix = table.similarity.matrix.round(1) if tied else table.similarity.matrix
    takers = matrix
    if turns == "auto" and tasks > 1:
        takers = np.array([matrix[table.similarity.task == task].max(0) for task in range(tasks)])
    lists = [sorted(range(ROWS), key=lambda row, q=q: (-q[row], row)) for q in takers]
    expected: list[int] = []
    while len(expected) < ROWS:
        for mine in lists:
            while mine:
                row = mine.pop(0)
                if row not in expected:
                    expected.append(row)
                    break
                if duplicate == "skip_turn":
                    break
    assert pick(RoundRobin(duplicate, turns), table, context(), 50) == expected[:50]
    assert pick(RoundRobin(duplicate, turns), table, context(), ROWS) == expected


def test_one_query_makes_both_the_plain_best(context):
    table = made(queries=1)
    best = np.argsort(-table.columns["similarity"], kind="stable")[:20].tolist()
    for picker in (RoundRobin(), RoundRobin("skip_turn"), DoublyGreedy()):
        assert pick(picker, table, context(), 20) == best


def test_doubly_greedy_sorts_by_the_nearest_query(context):
    table = made()
    assert table.similarity is not None
    expected = sorted(range(ROWS), key=lambda row: (-max(table.similarity.matrix[:, row]), row))  # type: ignore[union-attr]
    assert pick(DoublyGreedy(), table, context(), ROWS) == expected


def test_an_undecided_query_still_takes_its_turns(context):
    """A query to which all rows are equal takes the first rows left."""
    table = made(queries=2)
    assert table.similarity is not None
    table.similarity.matrix[1] = 0.5
    picked = pick(RoundRobin(), table, context(), 6)
    best = iter(np.argsort(-table.similarity.matrix[0], kind="stable").tolist())
    expected: list[int] = []
    for turn in range(6):
        options = iter(range(ROWS)) if turn % 2 else best
        expected.append(next(row for row in options if row not in expected))
    assert picked == expected


@pytest.mark.parametrize("count", [1, 5, 39, 40, 99])
def test_best_places_is_a_stable_sort(count):
    values = np.random.default_rng(0).integers(0, 6, 40).astype(np.float32)
    assert best_places(values, count).tolist() == np.argsort(-values, kind="stable")[:count].tolist()


# ---- transport ----


def plain_sinkhorn(cost: np.ndarray, epsilon: float, penalty: float, rounds: int) -> np.ndarray:
    """The plan, by scaling the rows and columns of exp(-cost / epsilon), one entry at a time."""
    queries, rows = cost.shape
    kernel = [[np.exp(-cost[i, j] / epsilon) for j in range(rows)] for i in range(queries)]
    u, v = [1.0] * queries, [1.0] * rows
    power = 1.0 if penalty == np.inf else penalty / (penalty + epsilon)
    for _ in range(rounds):
        for i in range(queries):
            u[i] = (1 / queries) / sum(kernel[i][j] * v[j] for j in range(rows))
        for j in range(rows):
            v[j] = ((1 / rows) / sum(kernel[i][j] * u[i] for i in range(queries))) ** power
    return np.array([[u[i] * kernel[i][j] * v[j] for j in range(rows)] for i in range(queries)])


@pytest.mark.parametrize("penalty,epsilon", [(0.0001, 0.05), (0.05, 0.05), (np.inf, 0.2)])
def test_transport_against_a_plain_loop(penalty, epsilon, context, monkeypatch):
    from ftrun.select.geometry import transport

    monkeypatch.setattr(transport, "ROWS_AT_ONCE", 7)  # several blocks, the last one short
    matrix = made(rows=30).similarity.matrix  # type: ignore[union-attr]
    rows = np.arange(2, 27)
    plan = sinkhorn(matrix, rows, 0.5, epsilon, context(), row_penalty=penalty, threshold=1e-12)
    expected = plain_sinkhorn((1 - matrix[:, rows].astype(np.float64)) / 2, epsilon, penalty, 300)
    assert np.allclose(plan.mass, expected.sum(axis=0), rtol=1e-8)
    found = np.exp(plan.queries[:, None] + plan.rows + (matrix[:, rows].astype(np.float64) - 1) / 2 / epsilon)
    assert np.allclose(found, expected, rtol=1e-8)
    assert np.allclose(found.sum(axis=1), 1 / QUERIES) and plan.mass.sum() == pytest.approx(1)


def test_momentum_ends_at_the_same_transport(context):
    matrix = made(rows=30).similarity.matrix  # type: ignore[union-attr]
    plans = [sinkhorn(matrix, np.arange(30), 2, 0.1, context(), momentum=m, threshold=1e-10) for m in (1.0, 1.3)]
    potentials = [plan.rows - plan.rows.mean() for plan in plans]  # they are defined up to a constant
    assert np.allclose(*potentials, atol=1e-6)
    assert all(np.allclose(plan.mass, 1 / 30) for plan in plans)  # balanced: every row gets its share


def test_a_transport_that_does_not_settle_is_said(context):
    ctx = context()
    sinkhorn(made().similarity.matrix, np.arange(ROWS), 2, 0.001, ctx, threshold=1e-12, iterations=2)  # type: ignore[union-attr]
    assert "not settled after 2 iterations" in ctx.report.warnings[0]


def test_uot_ranks_by_the_mass_of_the_plain_loop(context):
    table = made(rows=30)
    mass = plain_sinkhorn((1 - table.similarity.matrix.astype(np.float64)) / 2, 0.01, 0.0001, 30).sum(axis=0)  # type: ignore[union-attr]
    assert pick(Uot(), table, context(), 30) == np.argsort(-mass, kind="stable").tolist()


# ---- nearest neighbours ----


def plain_k(distances: np.ndarray, alpha: float, c: float) -> int:
    queries, most = distances.shape
    for k in range(1, most):
        gaps = sum(d[k] - d[j] for d in distances for j in range(k))
        if alpha / c * gaps >= (1 - alpha) * queries:
            return k
    return most


@pytest.mark.parametrize("alpha", [0.1, 0.3, 0.6])
def test_knn_uniform_against_a_plain_loop(alpha, context):
    table = made()
    matrix = table.similarity.matrix  # type: ignore[union-attr]
    sorted_rows = [sorted(range(ROWS), key=lambda row, q=q: (-q[row], row)) for q in matrix]
    distances = np.array([[1 - float(q[row]) for row in rows] for q, rows in zip(matrix, sorted_rows, strict=True)])
    k = plain_k(distances, alpha, 5.0)
    assert 1 < k < ROWS and KnnUniform(alpha).stop(distances) == k
    mass = np.zeros(ROWS)
    for rows in sorted_rows:
        mass[rows[:k]] += 1 / (k * QUERIES)
    assert mass.sum() == pytest.approx(1)
    assert pick(KnnUniform(alpha), table, context(), ROWS) == sorted(range(ROWS), key=lambda r: (-round(mass[r], 9), r))


def test_knn_uniform_on_a_small_pool_warns(context):
    ctx = context()
    picked = pick(KnnUniform(), made(), ctx, 5)  # alpha = 0.01 needs thousands of neighbours
    assert picked == [0, 1, 2, 3, 4] and "never meets its stop rule" in ctx.report.warnings[0]


def test_rows_without_mass_are_said(context):
    ctx = context()
    pick(KnnUniform(alpha=0.6), made(), ctx, ROWS)
    assert "rows have any mass" in ctx.report.warnings[0]


def plain_kde_masses(similarity: np.ndarray, vectors: np.ndarray, picker: KnnKde) -> np.ndarray:
    """Masses of all rows by a queue of the next neighbour of every query."""
    queries, rows = similarity.shape
    most, near = max(2, min(picker.neighbours, rows // 10)), min(picker.kde_neighbours, rows // 10)
    order = [sorted(range(rows), key=lambda row, q=q: (-q[row], row))[:most] for q in similarity]
    distance = [[max(0.0, 1 - float(q[row])) for row in mine] for q, mine in zip(similarity, order, strict=True)]
    reached = sorted({row for mine in order for row in mine})
    density = {}
    for row in reached:
        alike = sorted(max(0.0, 1 - float(vectors[row] @ vectors[other])) for other in reached)[:near]
        density[row] = sum(max(0.0, 1 - 2 * d / picker.sigma**2) for d in alike) if picker.sigma else 1.0
    last, cost = [0] * queries, [0.0] * queries
    spent = [distance[q][0] / density[order[q][0]] for q in range(queries)]
    queue = [(1 / density[order[q][0]], 0, q) for q in range(queries)]
    heapq.heapify(queue)
    level = 0.0
    while queue:
        level, k, q = heapq.heappop(queue)
        cost[q] = distance[q][k + 1] * level - spent[q]
        if picker.alpha / picker.c * sum(cost) >= (1 - picker.alpha) * queries:
            break
        last[q] = k
        if k < most - 2:
            heapq.heappush(queue, (level + 1 / density[order[q][k + 1]], k + 1, q))
            spent[q] += distance[q][k + 1] / density[order[q][k + 1]]
    mass = np.zeros(rows)
    for q in range(queries):
        given = 0.0
        for k in range(last[q] + 1):
            mass[order[q][k]] += 1 / queries / level / density[order[q][k]]
            given += 1 / queries / level / density[order[q][k]]
        mass[order[q][last[q] + 1]] += max(1 / queries - given, 0)
    return mass


@pytest.mark.parametrize(
    "knobs", [{"alpha": 0.4}, {"alpha": 0.6}, {"alpha": 0.01}, {"alpha": 0.5, "sigma": 0.0}], ids=repr
)
def test_knn_kde_against_a_plain_queue(knobs, context):
    table, picker = made(rows=300), KnnKde(**knobs)
    similarity, vectors = table.similarity.matrix, table.embeddings.astype(np.float64)  # type: ignore[union-attr]
    expected = plain_kde_masses(similarity, vectors, picker)
    assert expected.sum() == pytest.approx(1)
    carriers = int((expected > 0).sum())
    got = pick(picker, table, context(), carriers)
    assert np.allclose(expected[got], np.sort(expected)[::-1][:carriers], rtol=1e-5)
    positions, values = nearest_rows(table.similarity, np.arange(300), 30)  # type: ignore[arg-type]
    density = np.ones(300)
    density[np.unique(positions)] = picker.densities(table.embeddings[np.unique(positions)], 30, context())  # type: ignore[index]
    mass = np.zeros(300)
    np.add.at(mass, positions, picker.masses(np.maximum(1 - values, 0), density[positions]))
    assert np.allclose(mass, expected, atol=1e-6) and mass.sum() == pytest.approx(1)


def test_near_duplicates_share_a_mass():
    """Three copies of a row count a third each."""
    vectors = unit(np.array([[1.0, 0], [1, 0], [1, 0], [0, 1]]))
    picker = KnnKde()
    assert picker.densities(vectors, 4, None).tolist() == pytest.approx([3, 3, 3, 1])  # type: ignore[arg-type]


@pytest.mark.parametrize("knobs", [{"alpha": 0.0}, {"c": 0.0}, {"neighbours": 1}], ids=repr)
def test_knobs_out_of_range(knobs, context):
    for kind in (KnnUniform, KnnKde):
        with pytest.raises(ConfigError):
            pick(kind(**knobs), made(), context(), 3)
    with pytest.raises(ConfigError, match="kde_neighbours"):
        pick(KnnKde(kde_neighbours=0), made(), context(), 3)
    with pytest.raises(ConfigError, match="epsilon"):
        pick(Uot(epsilon=0), made(), context(), 3)


def test_the_error_names_every_scorer_that_compares(tiny_dir, rows_file, capsys):
    words = ["select=longest", "select.picker=round_robin", f"model.path={tiny_dir}", f"data.path={rows_file}"]
    assert cli.entry(["select", *words, "budget=3"]) == 2
    said = capsys.readouterr().err
    for name in ("embedding_similarity", "got_d", "less", "rds_plus", "trim"):
        assert name in said
