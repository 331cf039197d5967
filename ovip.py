"""OViP (online vision-language preference learning): its index of hallucination reduction.

    HRI = 2 sum_i (a_i - base_i) / (ref_i - base_i)                                    (OViP, Eq. 7)

The measures a_1 ... a_5 are F1 of AMBER generative (`f1_amber_generative`), the MMHal score, F1 of
Object HalBench, the score of LLaVA-Bench in the wild, and F1 of AMBER discriminative (positive:
"no"). The paper takes base and ref from its own models, all of them LLaVA-1.5. An HRI with these
constants compares LLaVA-1.5 models with each other only. For another model, such as Qwen2.5-VL,
give the measures of your own baseline as `base`, and report it beside the number.

gpt-4o-2024-05-13 scores MMHal, Object HalBench and LLaVA-Bench. Without it a_2, a_3, a_4 and the
HRI are unknown. The measures of AMBER need no judge.
"""

from collections.abc import Sequence
from typing import NamedTuple

__all__ = [
    "CONSTANTS",
    "MEASURES",
    "Constants",
    "f1_amber_generative",
    "hallucination_reduction_index",
]

MEASURES = (
    "F1 AMBER generative",
    "MMHal score",
    "F1 Object HalBench",
    "LLaVA-Bench score",
    "F1 AMBER discriminative",
)


class Constants(NamedTuple):
    base: tuple[float, ...]
    ref: tuple[float, ...]


LLAVA_7B = (65.01, 1.90, 72.40, 57.20, 85.5)
CONSTANTS = {  # of LLaVA-1.5, by the tables of the paper they belong to (App. A.1)
    # main table, online against offline, further study
    "7B": Constants(LLAVA_7B, (67.12, 2.65, 74.18, 60.90, 87.4)),
    # main table
    "13B": Constants((65.99, 2.24, 76.73, 62.60, 89.1), (68.98, 2.57, 79.00, 67.90, 90.2)),
    "7B, loss ablation": Constants(LLAVA_7B, (68.57, 2.70, 74.14, 64.10, 87.20)),
}


def f1_amber_generative(chair: float, cover: float) -> float:
    """F1 of AMBER generative: the harmonic mean of 100 - CHAIR and Cover (OViP, App. A.2).

    All in percent. 0 if both are 0.
    """
    precision = 100 - chair
    return 2 * precision * cover / (precision + cover) if precision + cover else 0.0


def hallucination_reduction_index(
    measures: Sequence[float], base: Sequence[float], ref: Sequence[float]
) -> float:
    """HRI = 2 sum_i (a_i - base_i) / (ref_i - base_i), Eq. 7.

    measures, base, ref: five numbers each, in the order of `MEASURES`; in percent, and 0 to 6 for
    MMHal. base and ref have no default, because they belong to the model (`CONSTANTS["7B"]` for
    LLaVA-1.5 7B). The HRI is 0 for the baseline, 10 if every measure reaches its reference, and
    negative if hallucination grew. It is not clipped. Raises ValueError for other than five
    numbers, or if a reference is not above its baseline.
    """
    if not len(measures) == len(base) == len(ref) == len(MEASURES):
        raise ValueError(f"HRI takes five measures, bases and references: {', '.join(MEASURES)}")
    if below := [name for name, b, r in zip(MEASURES, base, ref) if b >= r]:
        raise ValueError(
            f"HRI: the reference is not above the baseline in {', '.join(below)}: there is no scale"
        )
    return 2 * sum((a - b) / (r - b) for a, b, r in zip(measures, base, ref))
