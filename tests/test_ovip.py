"""ovip.py: the index against the paper's own tables."""

import json
from pathlib import Path

import pytest

import ovip

pytestmark = pytest.mark.quick
VECTORS = (Path(__file__).parent / "benchmark_vectors.json").read_text(encoding="utf-8")
ROWS = json.loads(VECTORS)["ovip"]["vectors"]


@pytest.mark.parametrize("v", ROWS, ids=lambda v: f"{v['model']} {v['method']}")
def test_the_papers_table(v):
    assert round(ovip.f1_amber_generative(v["chair"], v["cover"]), 2) == v["f1_formula"]
    # 13B's baseline is printed as 65.99, not 66.00
    assert v["f1_formula"] == pytest.approx(v["f1_reported"], abs=0.0101)
    index = ovip.hallucination_reduction_index(v["a"], *ovip.CONSTANTS[v["model"]])
    assert round(index, 2) == v["hri_formula"] == (v["hri_reported"] or 0)


def test_the_index_by_hand():
    base, ref = (0, 0, 0, 0, 0), (1, 2, 4, 5, 10)
    assert ovip.hallucination_reduction_index(ref, base, ref) == 10
    assert ovip.hallucination_reduction_index((1, 1, 0, 0, -10), base, ref) == 2 * (1 + 0.5 - 1)
    assert ovip.hallucination_reduction_index((9, 0, 0, 0, 0), base, ref) == 18  # not clipped


def test_the_index_is_refused_where_it_means_nothing():
    says = "takes five measures, bases and references: F1 AMBER generative, MMHal"
    with pytest.raises(ValueError, match=says):
        ovip.hallucination_reduction_index((1, 2, 3), (0, 0, 0), (1, 1, 1))
    with pytest.raises(ValueError, match="the reference is not above the baseline in MMHal score"):
        ovip.hallucination_reduction_index((1,) * 5, (0,) * 5, (1, 0, 1, 1, 1))
    with pytest.raises(TypeError):
        ovip.hallucination_reduction_index((1,) * 5)  # no default: the base is the model's own


def test_the_loss_ablation_has_the_baseline_of_the_main_table():
    assert ovip.CONSTANTS["7B, loss ablation"].base == ovip.CONSTANTS["7B"].base
    assert ovip.CONSTANTS["7B, loss ablation"].ref == (68.57, 2.70, 74.14, 64.10, 87.20)


def test_nothing_of_nothing_is_nothing():
    assert ovip.f1_amber_generative(100, 0) == 0
