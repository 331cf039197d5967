"""What the paper claims, as differences that the arms of reproduce.py can show or refute.

A claim is a difference between two arms, or between two moments of one, in one measure, with the
paper's own number beside it. `CRITERIA` says what the world must show before any cure is tried.
"""

from dataclasses import dataclass, replace

from replication.arms import FEATURES, TAUS, WEIGHTS


@dataclass(frozen=True)
class Claim:
    """`more` - `less` in one measure, in the direction that is claimed (1: greater, -1: smaller).

    more, less: (arm, side), side "before" or "after" RL, or "gain", the second less the first.
    share: `less` counts by this share only.
    least: how far on its side of 0 the difference must lie; below 0, how far it may lie on the
    other side.
    """

    words: str
    more: tuple[str, str]
    less: tuple[str, str]
    split: str
    measure: str
    direction: int
    paper: str = "-"
    least: float = 0.0
    share: float = 1.0


def of(arm: str, side: str = "after") -> tuple[str, str]:
    return arm, side


def better(
    words: str, more: str, less: str, paper: tuple[str, str, str] = ("-",) * 3
) -> list[Claim]:
    """`more` does better than `less`: in its answers, and in what its captions say. paper: its
    difference on MMVU, VideoHallucer and POPE, the nearest of its benchmarks."""
    rows = [
        ("test", "accuracy", 1, f"MMVU {paper[0]}"),
        ("test_prior_breaking", "accuracy", 1, "-"),
        ("test_pairs", "paired", 1, f"VideoHallucer {paper[1]}"),
        ("test_pairs", "accuracy", 1, f"POPE {paper[2]}"),
        ("test", "answerable captions", 1, "-"),
        ("test", "true captions", 1, "-"),
        ("test_prior_breaking", "true captions", 1, "-"),
        ("test", "right, caption wrong", -1, "-"),
        ("test", "caption wrong if right", -1, "-"),
        ("test", "hallucinated objects", -1, "-"),
        ("test_prior_breaking", "right, caption wrong", -1, "-"),
    ]
    return [
        Claim(words, of(more), of(less), split, measure, way, "-" if said.endswith("-") else said)
        for split, measure, way, said in rows
    ]


def answers_better(words: str, more: str, less: str, paper: tuple = ("-",) * 3) -> list[Claim]:
    """`better`, of arms of which one has no captions."""
    return better(words, more, less, paper)[:4]


def moved(words: str, arm: str, pairs: str = "-", accuracy: str = "-") -> list[Claim]:
    """RL lowers hallucination benchmarks, and raises the others: after against before."""
    one, two = of(arm), of(arm, "before")
    return [
        Claim(f"{words} answers fewer pairs right", one, two, "test_pairs", "paired", -1, pairs),
        Claim(f"{words} answers better", one, two, "test", "accuracy", 1, accuracy),
    ]


RL, START = of("plain"), of("plain", "before")
CRITERIA = [
    Claim(
        "RL on answers raises accuracy by 10 points or more",
        RL, START, "test", "accuracy", 1, least=0.1,
    ),
    Claim(
        "right answers behind wrong captions become more frequent",
        RL, START, "test", "right, caption wrong", 1,
    ),
    Claim(
        "... and of the right answers, more stand behind one",
        RL, START, "test", "caption wrong if right", 1,
    ),
    Claim(
        "hallucination falls by less than a fifth (difference: after - 0.8 x before)",
        RL, START, "test", "hallucinated objects", 1, share=0.8,
    ),
    Claim(
        "held-out pairs do not gain 5 points",
        RL, START, "test_pairs", "paired", -1, least=-0.05,
    ),
]  # fmt: skip
IDEAS = [  # what is compared for the summary: an arm, and the one that lacks the idea
    ("Caption Reward, added to plain GRPO", "caption", "plain"),
    ("Caption Reward, within ours", "ours", "no-reward"),
    ("selection, added to plain GRPO", "select", "plain"),
    ("selection, within ours", "ours", "full"),
    ("Eq. 4, added to plain GRPO", "eq4", "plain"),
    ("Eq. 4, within ours", "ours", "no-eq4"),
    ("selection and Eq. 4, added to the Caption Reward", "ours", "caption"),
    ("all three, added to plain GRPO", "ours", "plain"),
]
CLAIMS = {  # heading: the command that runs its arms, the claims
    "What RL does (Table 1)": ("--table 1", [
        *moved("two-stage GRPO, after RL against before it,", "grpo",
               "VideoHallucer -1.2 from SFT, -4.2 from base",
               "MMVU -0.6 from SFT, +4.5 from base"),
        *moved("four-stage GRPO, after RL against before it,", "plain"),
    ]),
    "All three together (Table 1)": ("--table 1", [
        *answers_better("ours beats two-stage GRPO", "ours", "grpo", ("+3.5", "+8.5", "+5.1")),
        *(replace(claim, more=of("ours", "gain"), less=of("grpo", "gain"), paper="-")
          for claim in answers_better("ours gains more by RL than two-stage GRPO", "ours", "grpo")),
        *(replace(claim, less=of("base", "before"))
          for claim in answers_better("ours beats the base policy, asked directly", "ours", "base",
                                      ("+8.0", "+4.3", "+4.3"))),
        *better("ours beats plain four-stage GRPO", "ours", "plain"),
    ]),
    "Caption Reward (Table 2)": ("--table 2", [
        *better("ours beats ours without it", "ours", "no-reward", ("+2.3", "+2.2", "+2.1")),
        *better("added alone to plain GRPO it helps", "caption", "plain"),
    ]),
    "Caption stage (Table 2)": ("--table 2", [
        *answers_better("ours beats ours without stage and reward", "ours", "no-stage",
                        ("+3.0", "+3.2", "+3.5")),
        *answers_better("ours without reward beats ours without both", "no-reward", "no-stage",
                        ("+0.7", "+1.0", "+1.4")),
    ]),
    "Selection (Table 3)": ("--table 3", [
        *better("the top half by variance beats all prompts", "ours", "full",
                ("+1.3", "+1.4", "+1.2")),
        *better("medium beats all prompts", "medium", "full", ("+1.3", "+1.4", "+1.2")),
        *better("medium beats easy prompts", "medium", "easy", ("+3.4", "+3.1", "+2.1")),
        *better("medium beats hard prompts", "medium", "hard", ("+2.1", "+2.4", "+0.5")),
        *better("added alone to plain GRPO it helps", "select", "plain"),
        *better("the top half of each kind beats that of all", "within", "ours"),
        *better("the top half of each kind beats all prompts", "within", "full"),
    ]),
    "Eq. 4 (Table 4)": ("--table 4", [
        *better("ours beats ours without it", "ours", "no-eq4", ("+1.8", "+2.5", "+1.9")),
        *better("added alone to plain GRPO it helps", "eq4", "plain"),
        *better("its positives beat shuffled ones", "ours", "shuffled"),
    ]),
    "Variance and generalisation (Figure 1b)": ("--figure 1b", [
        replace(claim, paper="higher variance generalises better")
        for claim in better("the top 30 % of medium beat all of medium", "top30", "medium")[:2]
    ]),
    "Rewards by class (Figure 3)": ("--figure 3", [
        Claim("the caption reward rises more on medium than on hard prompts",
              of("full", "medium"), of("full", "hard"), "rise", "caption", 1, "more on medium"),
        Claim("by the second fifth the caption reward has risen more than the answer reward",
              of("full", "caption"), of("full", "accuracy"), "early rise", "caption", 1,
              "it precedes"),
    ]),
    "Entropy (Figure 4)": ("--figure 4", [
        Claim("easy prompts leave lower entropy than medium ones",
              of("easy"), of("medium"), "test", "entropy", -1, "lower"),
        Claim("hard prompts leave higher entropy than medium ones",
              of("hard"), of("medium"), "test", "entropy", 1, "higher"),
    ]),
    "Hallucination-as-Cue": ("--table cue", [
        *(Claim(f"RL on {name} answers better than its cold start", of(arm), of(arm, "before"),
                "test", "accuracy", 1, paper)
          for name, arm, paper in (
              ("blank pictures", "cue-blank", "+2.3 (7B), +2.5 (3B)"),
              ("random pictures", "cue-random_media", "+3.3 (7B), +2.7 (3B)"),
              ("questions without text", "cue-remove_text", "-"),
          )),
        *(Claim(f"RL on intact inputs answers better than on {name}", of("cue"), of(arm),
                "test", "accuracy", 1, paper)
          for name, arm, paper in (
              ("blank pictures", "cue-blank", "+0.4 (7B), +2.5 (3B)"),
              ("random pictures", "cue-random_media", "-0.7 (7B), +2.3 (3B)"),
              ("questions without text", "cue-remove_text", "-"),
          )),
        Claim("RL on blank pictures guesses better on them", of("cue-blank"),
              of("cue-blank", "before"), "test_blank", "accuracy", 1, "+4.4 (7B), +2.8 (3B)"),
    ]),
    "Other caption rewards": ("--table neighbours", [
        *better("the policy as its own judge helps plain GRPO", "self", "plain"),
        *better("an external judge beats the policy as judge", "caption", "self"),
        *better("the gain over no caption beats the verdict alone", "gain", "caption"),
        *better("all questions about a picture beat its own alone", "shared", "unshared"),
    ]),
    "OViP": ("--table neighbours", [
        *moved("OViP, after training against before it,", "ovip"),
        *better("OViP beats plain GRPO", "ovip", "plain"),
        *better("ours beats OViP", "ours", "ovip"),
    ]),
    "tau, weight and y_i of Eq. 4 (Figure 5)": ("--figure 5", [
        *(Claim(f"tau 0.54 answers better than {x}", of("ours"), of(f"tau-{x}"), "test", "accuracy",
                1, "peak at 0.54") for x in TAUS),
        *(Claim(f"weight {x} answers better than 0.01", of(f"weight-{x}"), of("ours"), "test",
                "accuracy", 1) for x in WEIGHTS),
        *(Claim(f"y_i {x} answers better than the reference", of(f"feature-{x}"), of("ours"),
                "test", "accuracy", 1)
          for x in FEATURES),
        *(Claim(f"{x} answers better than no Eq. 4", of(arm), of("no-eq4"), split, "accuracy", 1)
          for x, arm in (
              *((f"tau {x}", f"tau-{x}") for x in TAUS),
              *((f"weight {x}", f"weight-{x}") for x in WEIGHTS),
              *((f"y_i {x}", f"feature-{x}") for x in FEATURES),
          )
          for split in ("test", "test_pairs")),
        Claim("Eq. 4 brings its positives nearer to the anchor", of("ours"), of("ours", "before"),
              "representations", "positive", -1, "they form a neighbourhood"),
        Claim("... its positives nearer than without Eq. 4", of("ours"), of("no-eq4"),
              "representations", "positive", -1),
    ]),
}  # fmt: skip
