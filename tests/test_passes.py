"""Criteria: the numbers of their sources, and the contract that every installed one keeps."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from onnxprune import plugin, quality
from onnxprune.errors import InputError
from onnxprune.greedy import blocks
from onnxprune.passes import obs_struct
from onnxprune.passes.act_attn import ActivationAttention
from onnxprune.passes.act_mean import ActivationMean
from onnxprune.passes.angular import Angular, angle
from onnxprune.passes.blockpruner import SubLayers
from onnxprune.passes.bn_scale import BatchNormScale
from onnxprune.passes.bonsai import Bonsai, regression
from onnxprune.passes.finercut import FinerCut
from onnxprune.passes.fisher_mask import FisherMask
from onnxprune.passes.fluct import Fluctuation
from onnxprune.passes.goa import GreedyOutput
from onnxprune.passes.hap import RelativeTrace
from onnxprune.passes.laco import LayerCollapse
from onnxprune.passes.mag import Magnitude
from onnxprune.passes.moe_freq import ExpertUsage
from onnxprune.passes.oracle import Oracle
from onnxprune.passes.random_erk import RandomErk, erk_density
from onnxprune.passes.short_bi import influence
from onnxprune.passes.sleb import RedundantBlocks
from onnxprune.passes.stun import clusters
from onnxprune.passes.tail import Tail
from onnxprune.passes.wanda_sp import WandaStructured
from onnxprune.types import Group, Member


def member(name: str, axis: int, units: int, role: str = "weight", slot: str = "Gemm.1") -> Member:
    positions = np.arange(units)
    return Member(name, name, (("y", 1),), False, axis, positions, positions, role, slot)


def group(units: int, *members: Member, id: int = 0) -> Group:
    return Group(id, "channels", np.arange(units), members, (), (1,), ())


def weights(**arrays: list) -> plugin.Evidence:
    return plugin.Evidence(plugin.Weights(lambda name: np.array(arrays[name], np.float64)), 7)


def reader(x: list, w: list, each: int = 1, intercept: bool = True) -> plugin.Reader:
    """A reader of x [rows, columns] by w [outputs, columns], as METHODS writes it; a unit has `each` columns."""
    inputs, weight = np.array(x, np.float64), np.array(w, np.float64).T
    return plugin.Reader(
        node="y",
        read=weight.copy,
        shape=weight.shape,
        columns=np.arange(len(weight)).reshape(-1, each),
        intercept=intercept,
        profile=lambda: SimpleNamespace(
            count=len(inputs),
            mean=inputs.mean(axis=0),
            variance=inputs.var(axis=0, ddof=int(len(inputs) > 1)),
            l1=np.abs(inputs).sum(axis=0),
        ),
        second=lambda: (inputs.mean(axis=0), inputs.T @ inputs / len(inputs)),
        sample=lambda rows: inputs[:rows].astype(np.float32),
    )


def shown(readers: list = (), loss=None, junctions=(), router=None) -> plugin.Evidence:
    """Evidence of just these."""
    nothing = plugin.Weights(lambda name: np.zeros(0))
    return plugin.Evidence(nothing, 0, lambda g: readers, lambda g: junctions, lambda g: router, loss)


def quadratic(gradients: list):
    """A loss of half the summed squares of gradients [batches, units] times what is missing."""
    g = np.array(gradients, np.float64)

    def loss(levels, measure):
        return np.array([0.5 * ((g @ (1 - level[0])) ** 2).sum() for level in levels])

    return loss


PRODUCER = [[1, -2], [3, 0]]


def test_magnitude_of_rows_and_columns() -> None:
    pair = group(2, member("w", 0, 2), member("v", 1, 2))
    found = Magnitude(order=2).importance(pair, weights(w=PRODUCER, v=[[1, 1]]))
    np.testing.assert_allclose(found, [0.75, 1.25])


def test_magnitude_l1_normalises_by_the_mean() -> None:
    found = Magnitude(order=1).importance(group(2, member("w", 0, 2)), weights(w=[[1, -2], [5, 4]]))
    np.testing.assert_allclose(found, [0.5, 1.5])


def test_magnitude_counts_every_position_of_a_unit() -> None:
    flat = Member("w", "w", (("y", 1),), False, 0, np.arange(4), np.array([0, 0, 1, 1]), "weight", "Gemm.1")
    found = Magnitude(order=1).importance(group(2, flat), weights(w=[[1], [1], [3], [3]]))
    np.testing.assert_allclose(found, [0.5, 1.5])


def test_bn_scale_takes_the_smallest_gamma_first_and_says_when_there_is_none() -> None:
    scale = member("gamma", 0, 3, "norm", "BatchNormalization.1")
    found = BatchNormScale().importance(group(3, scale), weights(gamma=[0.9, -0.05, 0.4]))
    assert found is not None
    assert int(found.argmin()) == 1
    assert BatchNormScale().importance(group(2, member("w", 0, 2)), weights(w=PRODUCER)) is None


def test_erk_density() -> None:
    assert erk_density((64, 32, 3, 3)) == pytest.approx(0.005534, abs=1e-6)


def test_random_erk_keeps_layers_in_proportion() -> None:
    wide, narrow = np.zeros((400, 400)), np.zeros((400, 40))
    store = weights(wide=wide, narrow=narrow)
    a = RandomErk().importance(group(400, member("wide", 0, 400), id=0), store)
    b = RandomErk().importance(group(400, member("narrow", 0, 400), id=1), store)
    threshold = np.quantile(np.concatenate([a, b]), 0.7)
    kept = (a > threshold).mean() / (b > threshold).mean()
    assert kept == pytest.approx(erk_density(wide.shape) / erk_density(narrow.shape), rel=0.25)
    again = RandomErk().importance(group(400, member("wide", 0, 400), id=0), store)
    np.testing.assert_array_equal(a, again)


FLAP = reader([[1, 2], [3, 2]], [[1, 10], [2, 0]])  # the example of METHODS B7 and B8


def test_fluctuation_forgives_what_is_constant() -> None:
    np.testing.assert_allclose(Fluctuation.columns(FLAP), [10, 0])
    assert int(Fluctuation().importance(group(2), shown([FLAP])).argmin()) == 1


def test_wanda_takes_what_is_constant_for_important() -> None:
    np.testing.assert_allclose(WandaStructured.columns(FLAP), [4.7434, 14.1421], atol=1e-4)
    assert int(WandaStructured().importance(group(2), shown([FLAP])).argmin()) == 0


def test_scores_by_reader_add_up_over_the_columns_of_a_unit() -> None:
    heads = reader([[1, 2, 3, 4], [3, 2, 1, 0]], [[1, 1, 1, 1]], each=2)
    columns = WandaStructured.columns(heads)
    found = WandaStructured().importance(group(2), shown([heads]))
    np.testing.assert_allclose(found, columns.reshape(2, 2).sum(axis=1) / columns.sum() * 2)


def test_activation_scores() -> None:
    channel = reader([[1], [-1], [2], [0]], [[1]])
    np.testing.assert_allclose(ActivationAttention(power=2).units(channel), [1.5])
    np.testing.assert_allclose(ActivationAttention(power=1).units(channel), [1.0])
    head = reader([[3, 4]], [[1, 1]], each=2)
    np.testing.assert_allclose(ActivationMean(norm="l2").units(head), [5])
    np.testing.assert_allclose(ActivationMean(norm="mean").units(head), [3.5])


def test_greedy_output_approximation() -> None:
    one = reader([[1], [3]], [[1], [2]])  # E[h^2] = 5, ||W||^2 = 5
    np.testing.assert_allclose(GreedyOutput.errors(one), [[25]])


def test_greedy_output_approximation_sees_what_units_share() -> None:
    x = np.array([[1.0, 1.0, 2.0], [1.0, 1.0, -1.5], [1.0, 1.0, -0.5]])  # twice the same, and less of something else
    alike, opposed = reader(x.tolist(), [[1, 1, 1]]), reader(x.tolist(), [[1, -1, 1]])
    assert int(GreedyOutput(joint=0).importance(group(3), shown([alike])).argmax()) == 2
    assert int(GreedyOutput().importance(group(3), shown([alike])).argmax()) == 1
    np.testing.assert_allclose(GreedyOutput.errors(opposed)[:2, :2].sum(), 0, atol=1e-12)
    assert int(GreedyOutput().importance(group(3), shown([opposed])).argmax()) == 2


def test_relative_trace_is_half_the_mean_curvature_times_squared_weights() -> None:
    unit = reader([[1], [1]], [[0.5], [0.5]])  # ||w||^2 = 0.5; the loss curves with Tr / p = 8 / 4 along it

    def loss(levels, measure):
        return np.array([0.5 * 2 * 0.5 * (1 - level[0][0]) ** 2 for level in levels])

    np.testing.assert_allclose(RelativeTrace().importance(group(1), shown([unit], loss)), [0.5])
    assert RelativeTrace().importance(group(1), shown([unit])) is None


def test_fisher_information_of_masks() -> None:
    heads = replace(group(2), kind="heads")
    found = FisherMask().importance(heads, shown(loss=quadratic([[1, 0.5], [2, 0.5]])))
    np.testing.assert_allclose(found, [5, 0.5])
    assert FisherMask().importance(group(2), shown(loss=quadratic([[1, 1]]))) is None


def test_the_oracle_may_find_that_a_unit_harms() -> None:
    def loss(levels, measure):
        return np.array([0.2 if level[0][0] == 0 else -0.1 for level in levels])

    np.testing.assert_allclose(Oracle().importance(group(2), shown(loss=loss)), [0.2, -0.1])


def test_perturbative_regression() -> None:
    masks = np.array([[1, 0, 1], [0, 1, 0], [1, 1, 0], [0, 0, 1]], np.float64)
    np.testing.assert_allclose(regression(masks, np.array([4.0, 2, 3, 3]), 1e-12), [1, 2, 3], atol=1e-6)


def test_bonsai_finds_what_matters() -> None:
    worth = np.array([3.0, 0.1, 2.0, 0.2, 1.0, 0.05, 4.0, 0.5])

    def loss(levels, measure):
        return np.array([(worth * (1 - level[0])).sum() for level in levels])

    found = Bonsai(rounds=4, masks=64, ridge=1e-6).importance(group(8), shown(loss=loss))
    assert set(np.argsort(found)[:4]) == {1, 3, 5, 7}


def test_block_influence_and_angle() -> None:
    x, y = np.array([[1.0, 0.0]], np.float32), np.array([[1.0, 1.0]], np.float32)
    assert influence(plugin.Junction(x, y)) == pytest.approx(0.2929, abs=1e-4)
    assert angle(x, y) == pytest.approx(0.25)
    assert influence(plugin.Junction(np.zeros_like(x), y)) == 1


def layers(count: int, period: int = 1) -> Group:
    slots = ["MatMul.1", "Gemm.1", "Conv.1"]
    members = tuple(
        Member(f"w{k}", f"w{k}", (), False, 0, np.arange(3), np.full(3, k), "weight", slots[k % period])
        for k in range(count)
    )
    return replace(group(count, *members), kind="layers")


def test_blocks_repeat_in_what_holds_their_weights() -> None:
    assert [part.tolist() for part in blocks(layers(6, 2))] == [[0, 1], [2, 3], [4, 5]]
    assert len(blocks(layers(5, 1))) == 5
    assert len(blocks(layers(5, 2))) == 5


def test_angular_takes_the_run_that_turns_least() -> None:
    turns = np.deg2rad([0, 40, 45, 50, 90, 130])
    states = np.stack([np.cos(turns), np.sin(turns)], axis=1)[:, None].astype(np.float32)
    junctions = [plugin.Junction(states[k], states[k + 1]) for k in range(5)]
    found = Angular(share=0.4).importance(layers(5), shown(junctions=junctions))
    assert sorted(np.argsort(found)[:2]) == [1, 2]


def test_greedy_runs_count_their_runs_and_spare_the_ends() -> None:
    asked = []

    def loss(levels, measure):
        asked.append(len(levels))
        return np.array([(np.arange(1, 8) * (1 - level[0])).sum() for level in levels])

    found = RedundantBlocks().importance(layers(7), shown(loss=loss))
    assert asked == [5, 4, 3, 2, 1]  # of 7 blocks without the first and the last
    assert np.argsort(found, kind="stable")[:5].tolist() == [1, 2, 3, 4, 5]
    assert found[0] == found[6] == found.max()
    found = SubLayers().importance(layers(4), shown(loss=lambda levels, measure: np.ones(len(levels))))
    assert found.argmin() == 3  # of equals the deeper one


def test_finercut_asks_for_its_measure() -> None:
    asked = set()

    def loss(levels, measure):
        asked.add(measure)
        return np.ones(len(levels))

    FinerCut().importance(layers(3), shown(loss=loss))
    FinerCut(measure="angle").importance(layers(3), shown(loss=loss))
    assert asked == {"jensen-shannon", "angle"}
    one, other = ({"y": np.array([row])} for row in ([1.0, 0.0], [0.0, 1.0]))
    assert quality.jensen_shannon([one], [other]) == pytest.approx(np.log(2), abs=1e-6)
    assert quality.angle([one], [other]) == pytest.approx(0.5)


def test_layer_collapse_stops_where_outputs_turn() -> None:
    def loss(levels, measure):
        assert measure == "angle"
        return np.array([0.0 if level[0][:2].all() else 0.5 for level in levels])

    found = LayerCollapse(span=2).importance(layers(6), shown(loss=loss))
    assert (found[:2] > 1).all()
    assert found[[3, 4]].max() < 1  # the deepest run, of which the last block stands for the others
    assert found[5] > 1


def test_tail_goes_first() -> None:
    assert np.argsort(Tail().importance(layers(32), shown()))[:8].tolist() == list(range(31, 23, -1))


def test_expert_usage() -> None:
    picks = np.eye(3)[[0, 0, 1, 2]]
    router = plugin.Router(picks, 1, np.arange(3))
    assert ExpertUsage.counts(router).tolist() == [2, 1, 1]
    logits = np.array([[1.0, 2.0, 3.0]])
    np.testing.assert_allclose(plugin.Router(logits, 3, np.arange(3)).gates().sum(), 1)
    two = plugin.Router(np.array([[1.0, 2.0, -9.0]]), 2, np.arange(3)).gates()
    np.testing.assert_allclose(two, [[0.2689, 0.7311, 0]], atol=1e-4)


def test_experts_with_close_router_rows_are_one_cluster() -> None:
    rows = np.array([[1, 0], [0.9, 0], [0, 1]])
    found = clusters(rows, np.array([[1.0], [5.0], [9.0]]))
    assert int(found.argmin()) in (0, 1)
    assert found.min() == pytest.approx(0.1)
    assert sorted(found)[1] == pytest.approx(np.sqrt(2), rel=1e-3)


BY_PLACE = ("angular", "laco", "random-erk", "bonsai", "sleb", "tail", "finercut", "blockpruner")  # or by chance


@pytest.mark.parametrize("name", sorted(plugin.available("criteria")))
def test_every_criterion_is_finite_and_follows_a_permutation_of_units(name: str) -> None:
    rng = np.random.default_rng(0)
    criterion, order = plugin.build("criteria", name), rng.permutation(6)
    w, gamma, x, out = (rng.standard_normal(shape) for shape in ((6, 5), 6, (40, 6), (4, 6)))
    tokens, scores = rng.standard_normal((7, 20, 3)).astype(np.float32), rng.standard_normal((30, 6))
    kinds = plugin.trait(criterion, "kinds") or ("channels",)

    def found(by: np.ndarray) -> np.ndarray:
        store = weights(w=w[by], gamma=gamma[by], row=w[by])
        members = (member("w", 0, 6), member("row", 0, 6), member("gamma", 0, 6, "norm", "BatchNormalization.1"))
        if kinds[0] == "experts":
            stacked = np.stack([w[by]] * 2, axis=2)
            store, members = weights(row=w[by], w=stacked), (member("row", 0, 6), member("w", 0, 6))
        units = replace(group(6, *members), kind=kinds[0])
        evidence = plugin.Evidence(
            store.weights,
            7,
            lambda g: [reader(x[:, by].tolist(), out[:, by].tolist())],
            lambda g: [plugin.Junction(tokens[6], tokens[6] + tokens[k]) for k in by],
            lambda g: plugin.Router(scores[:, by], 2, np.arange(6)),
            lambda levels, measure: np.array([((x[:, by] @ (1 - level[0])) ** 2).mean() for level in levels]),
        )
        answer = criterion.importance(units, evidence)
        assert answer is not None
        return answer

    first = found(np.arange(6))
    assert first.shape == (6,)
    assert np.isfinite(first).all()
    if name not in BY_PLACE:
        np.testing.assert_allclose(found(order), first[order], rtol=1e-6)


@pytest.mark.parametrize("name", sorted(plugin.available("criteria")))
def test_criteria_of_some_kinds_leave_the_others_alone(name: str) -> None:
    criterion = plugin.build("criteria", name)
    if kinds := plugin.trait(criterion, "kinds"):
        assert "channels" not in kinds
        assert criterion.importance(group(3), shown([FLAP], quadratic([[1, 1, 1]]))) is None


@pytest.mark.parametrize(
    ("kind", "text", "culprit"),
    [
        ("criteria", "nope", "nope"),
        ("criteria", "mag,order=3", "mag,order=3"),
        ("criteria", "mag,power=2", "power=2"),
        ("criteria", "mag,order=x", "order=x"),
        ("allocators", "global-rank,floor=1", "global-rank,floor=1"),
    ],
)
def test_bad_names_and_options_are_named(kind: str, text: str, culprit: str) -> None:
    with pytest.raises(InputError) as error:
        plugin.build(kind, text)
    assert error.value.object == culprit


def fits(memory: float) -> plugin.Evidence:
    """Evidence about nothing, in so many bytes."""
    return plugin.Evidence(plugin.Weights(lambda name: np.zeros(0)), memory=memory)


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("each", [1, 3])
def test_obs_struct_by_rows_is_that_by_second_moments(each: int, intercept: bool) -> None:
    rng = np.random.default_rng(0)
    mixed = rng.standard_normal((20, 60))
    readers = [
        reader(rng.standard_normal((50, 20)) @ mixed + 1, rng.standard_normal((outputs, 60)), each, intercept)
        for outputs in (7, 30)
    ]
    wanted = [obs_struct._State(one, 1e-3) for one in readers]
    found = obs_struct.ObsStruct(rows=50)._states(readers[:], fits(100_000))
    assert [type(one) for one in found] == [obs_struct._Rows] * 2
    assert [len(one.gram) for one in found] == [50, 50]
    left = np.arange(60 // each)
    while len(left) > 3:
        costs = [np.sum([one.costs(left) for one in states], axis=0) for states in (wanted, found)]
        np.testing.assert_allclose(costs[1], costs[0], rtol=2e-3)
        goes = np.argsort(costs[0])[:2]
        for state in (*wanted, *found):
            state.remove(left[goes])
        left = np.delete(left, goes)


def test_obs_struct_takes_as_many_rows_as_fit() -> None:
    rng = np.random.default_rng(0)
    one = reader(rng.standard_normal((900, 500)), rng.standard_normal((10, 500)))
    assert [type(state) for state in obs_struct.ObsStruct()._states([one], fits(2e7))] == [obs_struct._State]
    for memory, rows in ((9e6, 479), (4e6, 208), (0, 64)):
        (found,) = obs_struct.ObsStruct()._states([one], fits(memory))
        assert len(found.gram) == rows


@pytest.mark.parametrize("intercept", [True, False])
def test_obs_struct_by_rows_bears_a_channel_that_drowns_the_others(intercept: bool) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((64, 2048))
    x[0, 0] = 20_000
    one = reader(x, rng.standard_normal((4, 2048)) / 45, 64, intercept)
    (state,) = obs_struct.ObsStruct()._states([one], fits(0))
    left = np.arange(32)
    while len(left):
        costs = state.costs(left)
        assert np.isfinite(costs).all()
        assert left[0] != 0 or len(left) == 1 or costs.argmax() == 0
        state.remove(left[(goes := np.argsort(costs)[: max(1, len(left) // 8)])])
        left = np.delete(left, goes)


def test_obs_struct_asks_for_no_second_moments_that_are_not_to_be_had() -> None:
    def refused() -> tuple[np.ndarray, np.ndarray]:
        raise AssertionError

    rng = np.random.default_rng(0)
    one = reader(rng.standard_normal((90, 100)), rng.standard_normal((10, 100)))
    one = dataclasses.replace(one, second=refused)
    for memory in range(0, plugin.COPIES * 8 * 100**2, 50_000):
        assert not fits(memory).affords(100)
        assert isinstance(obs_struct.ObsStruct()._states([one], fits(memory))[0], obs_struct._Rows)
